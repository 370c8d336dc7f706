"""What tells GAN collapse early: figures of the log, sample grids, gan.png; which G is used."""

import copy
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import save_image

from data import TASKS, to_float
from models import Discriminator, Generator, gradient_norm
from postprocess import LESION_THRESHOLD, isolate_lesion
from support.figures import save_figure
from support.files import replace_file
from support.patchset import Patches
from support.runs import FIXED_NOISE, Run, read_log, torch_rng

FIXED = 64  # validation patches that the log and the grids look at
FIXED_Z = 8  # noise vectors for the spread over z,
VARIED = 8  # of each of so many patches
SHOWN_VARIED = 4  # of them in varieties.png
LASTING = 3  # rows of the log after which a sign of failure is said; a quarter of all for this one:
IGNORED = (
    "the noise is ignored, one patch gives one lesion (varieties.png); try --noise-cells 16, for "
    "calcifications --noise-cells 256 --no-sn-g"
)
CLASSES_OF_D = ("real", "fake", "benign", "normal")
GAMMAS = ("in G's encoder", "in G's decoder", "in D")  # order of the log's gamma of attention
PANELS = {  # of gan.png
    "losses": ("loss_d", "loss_g"),
    "accuracy of D": tuple(f"{name}_right" for name in CLASSES_OF_D),
    "gradient penalty": ("penalty", "gradient_norm"),
    "lesion": ("lesion_mean", "lesion_std", "lesion_share", "acceptance"),
    "collapse": ("spread_x", "spread_z", "dead_units"),
    "gamma of attention": GAMMAS,
}


def accuracies(logits: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Share of each of D's four sub-batches that it puts into the right class."""
    return {
        f"{name}_right": (x.argmax(dim=1) == target).float().mean()
        for target, (name, x) in enumerate(zip(CLASSES_OF_D, logits, strict=True))
    }


class Watch:
    """Fixed validation patches and noise, and what the average of G (in eval mode) makes of them.

    chosen: the generator to use. Of the second half of the last stage it is the last one of which
    config.g_accepted of the fixed lesions pass S3 to S5, or else the one of which most do; before,
    coarse changes of the whole patch pass.
    """

    def __init__(self, config, data: Path, G: Generator, run: Run):
        self.config, self.run, self.removal = config, run, config.task == "removal"
        pool = Patches.open(data, "val", TASKS[config.task].source)
        rows = np.linspace(0, len(pool) - 1, num=min(FIXED, len(pool))).astype(int)
        self.x = torch.from_numpy(to_float(pool[rows]))[:, None].to(run.device)
        rng = torch_rng(config.seed, 0, FIXED_NOISE)
        self.z = G.sample_noise(len(rows) + FIXED_Z, rng).to(run.device)
        self.chosen, self.best = copy.deepcopy(G), 0.0
        self.lasting: dict[str, int] = {}  # rows of the log in a row that show a sign of failure

    def state_dict(self) -> dict:
        return {"chosen": self.chosen.state_dict(), "best": self.best, "lasting": self.lasting}

    def load_state_dict(self, state: dict) -> None:
        self.chosen.load_state_dict(state["chosen"])
        self.best, self.lasting = state["best"], state["lasting"]

    def look(
        self, G: Generator, D: Discriminator, x_real: Tensor, size: int, alpha: float
    ) -> dict[str, object]:
        """A row of the log: how the losses went, what the fixed patches become, what looks wrong.

        x_real: real patches with the penalty's noise, at which the norm of D's gradient is taken
        """
        row = {"side": size, "alpha": alpha, **self.run.averages()}
        D.eval()  # no power iteration: looking changes nothing
        norm = gradient_norm(lambda x: D(x, size, alpha), x_real, torch.zeros_like(x_real))
        D.train()
        row["gradient_norm"] = norm.mean().item()
        attention = (G.encoder_attention, G.decoder_attention, D.attention)
        row["gamma"] = [a.gamma.item() for a in attention]
        row |= self.lesions(G, size, alpha)
        row["chosen"] = self._choose(G, row["acceptance"])
        row["warnings"] = self.signs_of_failure(row)
        return row

    @torch.no_grad()
    def lesions(self, G: Generator, size: int, alpha: float) -> dict[str, float]:
        """What the lesions of the fixed patches are like."""
        alive = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out: alive.append(out.amax((0, 2, 3)) > 0))
            for layer in G.decoder.modules()
            if isinstance(layer, torch.nn.Conv2d)
        ]
        lesion = G(self.x, self.z[FIXED_Z:], size, alpha)[:, 0]  # (N, s, s)
        for hook in hooks:
            hook.remove()
        component = "cluster" if self.config.task == "calcification" else "largest"  # Q27
        kept = [isolate_lesion(x, self.removal, component=component) for x in lesion.cpu().numpy()]
        over = (-lesion if self.removal else lesion) > LESION_THRESHOLD
        figures = {
            "dead_units": 1 - torch.cat(alive).float().mean(),
            "lesion_mean": lesion.mean(),
            "lesion_std": lesion.std(),
            "lesion_share": over.float().mean(),
            "spread_x": lesion.std(0).mean(),
            "spread_z": self.varieties(G, VARIED, size, alpha)[:, :, 0].std(0).mean(),
            "acceptance": np.mean([k is not None for k in kept]),
        }
        return {name: float(value) for name, value in figures.items()}

    def varieties(self, G: Generator, patches: int, size: int, alpha: float) -> Tensor:
        """(FIXED_Z, patches, 3, s, s): the first fixed patches with the same few noises each."""
        x = self.x[:patches]
        return torch.stack([G(x, z.expand(len(x), -1), size, alpha) for z in self.z[:FIXED_Z]])

    def _choose(self, G: Generator, acceptance: float) -> bool:
        late = self.run.done > self.config.steps - self.config.iters_final / 2
        chosen = not late or acceptance >= min(self.best, self.config.g_accepted)
        if chosen:
            self.chosen.load_state_dict(G.state_dict())
            self.best = max(self.best, acceptance) if late else 0.0
        return chosen

    def signs_of_failure(self, row: dict) -> list[str]:
        """Signs of failure that last, in words; said when they are new. Before the last stage is
        reached each of them is usual."""
        share, right = row["lesion_share"], min(row["real_right"], row["fake_right"])
        same = row["spread_x"] < 0.1 * abs(row["lesion_mean"]) or row["dead_units"] > 0.8
        signs = {
            "D wins outright; lower --d-lr or raise --g-lr": right > 0.98,
            "the lesions vanish; train longer, raise --g-lr or lower --d-lr": share < 0.002,
            "the lesions cover the patch; lower --g-lr or raise --d-lr": share > 0.7,
            "the lesions ignore their input; lower --g-lr or start again with another --seed": same,
            # What a removal leaves hangs on the tissue around: it rightly varies little.
            IGNORED: row["spread_z"] < row["spread_x"] / 5 and not self.removal,
        }
        grown = row["side"] == self.x.shape[-1] and row["alpha"] == 1
        present = [sign for sign, shown in signs.items() if shown and grown]
        self.lasting = {sign: self.lasting.get(sign, 0) + 1 for sign in present}
        quarter = max(LASTING, self.config.steps // self.config.log_every // 4)
        over = {s: n - (quarter if s == IGNORED else LASTING) for s, n in self.lasting.items()}
        for sign, rows in over.items():  # said when it is new, and again at the end
            last = rows > 0 and self.run.done == self.config.steps
            if (rows == 0 or last) and self.run.rank == 0:
                click.echo(f"step {self.run.done}: {sign}", err=True)
        return [sign for sign, rows in over.items() if rows >= 0]

    @torch.no_grad()
    def draw(self, G: Generator, size: int, alpha: float) -> None:
        """samples/STEP.png: patch, lesion (grey = no change) and result, four samples a row;
        varieties.png: a patch and what eight noises make of it, four rows; gan.png, what the log
        holds, over steps."""
        if self.run.rank > 0:
            return
        made = G(self.x[:16], self.z[FIXED_Z:][:16], size, alpha)
        lesion, before, after = made.unbind(1)  # (n, s, s) each
        tiles = torch.cat([before, (2 * lesion).clamp(-1, 1), after], dim=2)[:, None]
        one = self.varieties(G, SHOWN_VARIED, size, alpha)  # (FIXED_Z, n, 3, s, s)
        one = torch.cat([one[:1, :, 1], one[:, :, 2]]).transpose(0, 1).flatten(0, 1)[:, None]
        (self.run.folder / "samples").mkdir(exist_ok=True)
        names = f"samples/{self.run.done:06d}.png", "varieties.png"
        for name, shown, across in zip(names, (tiles, one), (4, 1 + FIXED_Z), strict=True):
            with replace_file(self.run.folder / name) as file:
                look = {"padding": 1, "normalize": True, "value_range": (-1, 1)}
                save_image(shown, file, "png", nrow=across, **look)
        rows = [r | dict(zip(GAMMAS, r["gamma"], strict=True)) for r in read_log(self.run.folder)]
        figure = Figure(figsize=(14, 7), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
            for name in names:
                axes.plot([r["step"] for r in rows], [r[name] for r in rows], label=name)
            axes.set(title=title, xlabel="step")
            axes.legend(fontsize="small")
        save_figure(figure, self.run.folder / "gan.png", dpi=80)
