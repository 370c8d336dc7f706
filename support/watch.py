"""What tells GAN collapse early: figures of the log, sample grids, gan.png."""

from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import save_image

from data import TASKS
from models import Generator, block_count
from postprocess import LESION_THRESHOLD, isolate_lesion
from support.files import replace_file
from support.patchset import Pool
from support.runs import FIXED_NOISE, read_log, torch_seed

RECORDED = (
    *("loss_d", "penalty", "gradient_norm", "loss_g"),
    *("real_right", "fake_right", "benign_right", "normal_right"),  # accuracy of D per class
)
FIXED = 64  # validation patches that the log and the grids look at
FIXED_Z = 8  # noise vectors for the spread over z
LASTING = 3  # rows of the log after which a sign of failure is said
GAMMA = ("in G's encoder", "in G's decoder", "in D")  # order of the log's gamma of attention


class Watch:
    """Fixed validation patches and noise: figures that tell collapse early, and sample grids."""

    def __init__(self, config, data: Path, device: torch.device):
        pool = Pool.open(data, "val", TASKS[config.task][0])
        rows = np.linspace(0, len(pool) - 1, num=min(FIXED, len(pool))).astype(int)
        self.task, self.x = config.task, pool.take(rows).to(device)
        rng = torch.Generator().manual_seed(torch_seed(config.seed, 0, FIXED_NOISE))
        z = torch.rand(len(rows) + FIXED_Z, 2 * block_count(config.patch_size), generator=rng)
        self.z = (2 * z - 1).to(device)
        self.lasting: dict[str, int] = {}  # rows of the log in a row that show a sign of failure

    @torch.no_grad()
    def look(self, G: Generator, size: int, alpha: float) -> tuple[dict, Tensor]:
        """(figures for the log, (N, 3, s, s) what G makes of the fixed patches)."""
        alive, training = [], G.training
        hooks = [
            layer.register_forward_hook(lambda _, __, out: alive.append(out.amax((0, 2, 3)) > 0))
            for layer in G.decoder.modules()
            if isinstance(layer, torch.nn.Conv2d)
        ]
        G.eval()
        made = G(self.x, self.z[FIXED_Z:], size, alpha)
        for hook in hooks:
            hook.remove()
        one_patch = G(self.x[:1].expand(FIXED_Z, -1, -1, -1), self.z[:FIXED_Z], size, alpha)
        G.train(training)
        lesion, removal = made[:, 0], self.task == "removal"
        component = "cluster" if self.task == "calcification" else "largest"  # Q27
        kept = [isolate_lesion(x, removal, component=component) for x in lesion.cpu().numpy()]
        figures = {
            "dead_units": 1 - torch.cat(alive).float().mean(),
            "lesion_mean": lesion.mean(),
            "lesion_std": lesion.std(),
            "lesion_share": ((-lesion if removal else lesion) > LESION_THRESHOLD).float().mean(),
            "spread_x": lesion.std(0).mean(),
            "spread_z": one_patch[:, 0].std(0).mean(),
            "acceptance": np.mean([k is not None for k in kept]),
        }
        return {name: float(value) for name, value in figures.items()}, made

    def warnings(self, row: dict) -> list[str]:
        """Signs of failure that last, in words; said when they are new. Before the last stage is
        reached each of them is usual."""
        share, flat = row["lesion_share"], 0.1 * abs(row["lesion_mean"])
        won = min(row["real_right"], row["fake_right"]) > 0.98
        signs = {
            "D wins outright; lower --d-lr or raise --g-lr": won,
            "the lesions vanish; train longer, raise --g-lr or lower --d-lr": share < 0.002,
            "the lesions cover the patch; lower --g-lr or raise --d-lr": share > 0.7,
            "the lesions ignore their input; lower --g-lr or start again with another --seed": (
                row["spread_x"] < flat or row["dead_units"] > 0.8
            ),
        }
        grown = row["side"] == self.x.shape[-1] and row["alpha"] == 1
        present = [sign for sign, shown in signs.items() if shown and grown]
        self.lasting = {sign: self.lasting.get(sign, 0) + 1 for sign in present}
        for sign, rows in self.lasting.items():
            if rows == LASTING:
                click.echo(f"step {row['step']}: {sign}", err=True)
        return [sign for sign, rows in self.lasting.items() if rows >= LASTING]

    def grid(self, made: Tensor, path: Path) -> None:
        """Patch, lesion (grey = no change) and result side by side, four samples a row."""
        lesion, before, after = made[:16].unbind(1)  # (n, s, s) each
        tiles = torch.cat([before, (2 * lesion).clamp(-1, 1), after], dim=2)[:, None]
        path.parent.mkdir(exist_ok=True)
        with replace_file(path) as file:
            save_image(tiles, file, "png", nrow=4, padding=1, normalize=True, value_range=(-1, 1))


def plot_log(run: Path) -> None:
    """`run/gan.png`: what the log holds, over steps. Raises ValueError for a damaged row."""
    panels = {
        "losses": ("loss_d", "loss_g"),
        "accuracy of D": ("real_right", "fake_right", "benign_right", "normal_right"),
        "gradient penalty": ("penalty", "gradient_norm"),
        "lesion": ("lesion_mean", "lesion_std", "lesion_share", "acceptance"),
        "collapse": ("spread_x", "spread_z", "dead_units"),
    }
    figures = ["step", "gamma", *(name for names in panels.values() for name in names)]
    rows = [r | dict(zip(GAMMA, r["gamma"], strict=True)) for r in read_log(run, figures=figures)]
    panels["gamma of attention"] = GAMMA
    figure = Figure(figsize=(14, 7), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for name in names:
            axes.plot([r["step"] for r in rows], [r[name] for r in rows], label=name)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize="small")
    with replace_file(run / "gan.png") as file:
        figure.savefig(file, format="png", dpi=80, metadata={"Software": None})
