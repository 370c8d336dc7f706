"""A run of train-gan stripped to what `synthesize` and `train-gan --init` need, in half precision.

    python -m support.publish RUN OUT

OUT works as a run: --gan OUT, --init OUT. It holds hashes of the training images and the ids of
their patients, so that a leak is seen wherever it is taken: publish those of public archives only.
"""

import shutil
import sys
from pathlib import Path

import torch

from models import generator
from support import runs
from support.files import write_json


def publish(run: Path, out: Path) -> None:
    """Raises ValueError when the run is not finished or damaged."""
    facts = runs.finished(run, "train-gan")
    with runs.checkpoint(run) as state:
        D, chosen = (
            {k: v.half() if v.is_floating_point() else v for k, v in part.items()}
            for part in (state["D"], state["watch"]["chosen"])
        )
    out.mkdir(parents=True)
    kept = {"format": runs.CHECKPOINT_FORMAT, "D": D, "watch": {"chosen": chosen}}
    torch.save(kept, out / "checkpoint.pt")
    shutil.copyfile(run / "gan.png", out / "gan.png")
    G = generator(facts["config"])
    G.load_state_dict(chosen)
    facts |= {"generator": runs.weights_hash(G)}  # as rounded
    write_json(out / "config.json", facts)  # last: the folder is whole


if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(sys.argv[2]))
