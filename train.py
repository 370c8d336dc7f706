"""§2 Training details, Progressive growing; §3 Patch Classifier Training: configurations and loops.

Each step's batch and noise are drawn from (seed, step): a run that was stopped and started again
equals one that was not, bitwise on the CPU. support/runs.py keeps the run. Where a sentence stands:

    "Adam ... learning rate of 1e-5"                   GanConfig, ADAM
    "Over 3000 iterations, the weight ... decreases"   growth
    "examples of all four classes for each update"     GanBatches, update_D in train_gan
    "we train the generator twice"                     GanConfig.g_updates, the loop of train_gan
    "initialized with weights trained from ImageNet"   first_weights
    "positive and negative ... equal probability"      ClassifierBatches.draw
    "decayed by 10% every 5000 training samples"       synthetic_proportion, used in draw
    "the final weights are chosen"                     Best, validation_auc, train_classifier
"""

import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.utils import parametrize

from data import TASKS, to_float
from models import (
    COMBINED,
    Classifier,
    Discriminator,
    Generator,
    classifier,
    discriminator,
    discriminator_loss,
    down2,
    generator,
    generator_loss,
    gradient_penalty,
    update_average,
)
from support import imagenet, runs
from support.patchset import Patches, SyntheticSet
from support.provenance import classifier_facts, gan_facts, usable_sets
from support.runs import Graph, ReadAhead, Run
from support.watch import Watch, accuracies

# --- §2 Training details, Progressive growing ---


@dataclass(frozen=True)
class GanConfig:
    """One GAN: the paper's numbers. Lengths in steps: one D update with its G updates."""

    task: str = "mass"  # mass, calcification or removal: separate models (G14)
    seed: int = 0
    patch_size: int = 256  # G1
    g_base: int = 16  # filters of the generator's first block (G3)
    g_center: int = 2048  # channels of its 4 x 4 centre (G8; Q1)
    d_base: int = 128  # 8 x the generator's (D1)
    d_center: int = 16384
    noise_cells: int = 0  # 0 = "a random scalar value" a block (G5), else values on coarse maps, Q2
    sn_g: bool = True  # spectral normalisation (G16; Q12)
    sn_d: bool = True
    batch_size: int = 8  # of each of the four classes; not given, Q18
    iters_base: int = 30_000  # steps at half size; not given, Q18
    iters_fade: int = 3_000  # steps of the fade to full size (T5)
    iters_final: int = 30_000  # steps at full size after it; not given, Q18
    g_lr: float = 1e-5  # T1
    d_lr: float = 1e-5
    g_updates_mass: int = 2  # generator updates per D update for masses (T2); otherwise 1
    gp_noise: str = "uniform"  # delta ~ U(0, 1) (L4), or "std": times half the patch's std (Q15)
    g_average: float = 0.0  # decay of the average of G's weights that is used; 0 = none, Q11
    g_accepted: float = 0.0  # take the last G of which this share of the validation lesions passes
    # S3 to S5, or else the G of which most pass (support/watch.py); 0 = the last G, as the paper
    bfloat16: bool = True  # on a GPU: autocast; the CPU always computes in float32
    log_every: int = 100  # steps between rows of log.jsonl
    save_every: int = 1_000  # steps between checkpoints, sample grids and gan.png

    @property
    def steps(self) -> int:
        return self.iters_base + self.iters_fade + self.iters_final

    @property
    def g_updates(self) -> int:
        return self.g_updates_mass if self.task == "mass" else 1  # T2


# What the small presets change beyond size, each with its measurement (docs/PAPER.md):
SMALL = {
    "noise_cells": 16,  # scalars a block were ignored: spread 0.009 over z, 0.042 between inputs
    "sn_d": False,  # with it the loss of D stayed at chance, 3.0 to 3.4 for 400 steps; without 2.6
    "g_lr": 2e-4,  # the lesions are local after 600 steps; with 4e-4 they had faded by then
    "d_lr": 2e-4,  # 5e-4 and 1e-3 left fewer lesions over the threshold (0.13 and 0.19 for 0.31)
    "g_updates_mass": 1,  # the second costs a quarter of a step's time
    "gp_noise": "std",  # with U(0, 1) at most 0.06 of the lesions passed after 600 steps, not 0.28
    "g_accepted": 0.3,  # acceptance wavered between 0.02 and 0.36 within 300 steps
}
CPU = {"g_base": 8, "g_center": 1024, "log_every": 50}
GAN_PRESETS = {
    "paper": GanConfig(),
    # Minutes on a GPU, where the steps of the fade take ten times as long as the others.
    "cbis": GanConfig(
        **SMALL,
        patch_size=128,
        d_base=64,
        d_center=8192,
        iters_base=1_000,
        iters_fade=200,
        iters_final=6_000,
        g_average=0.995,
    ),
    "cbis-cpu": GanConfig(
        **SMALL,
        **CPU,
        patch_size=128,
        d_base=16,  # with 24 filters and 3,400 steps told from real masses at 0.79, not 0.69
        d_center=2048,
        iters_base=400,
        iters_fade=100,
        iters_final=1_700,
        g_average=0.995,
        save_every=400,
    ),
    "tiny": GanConfig(
        **SMALL,
        **CPU,
        patch_size=64,
        d_base=32,  # masses were told from real ones at 0.75, with half the filters at 0.79
        d_center=4096,
        iters_base=300,
        iters_fade=100,
        iters_final=1_400,
        g_average=0.99,  # evens out steps this long; not measured alone
        save_every=200,
    ),
}

# Calcifications with the small presets: a grain is a pixel or two, so that it needs noise of its
# own, does not exist at half size, and is lost where G is held smooth.
GRAINS = {"noise_cells": 256, "sn_g": False, "iters_base": 0, "iters_fade": 0}
CALCIFICATION = {"cbis": GRAINS, "cbis-cpu": GRAINS}
CALCIFICATION["tiny"] = GRAINS | {"d_base": 16, "d_center": 2048}  # with 32 plaques, not grains


def gan_presets(task: str) -> dict[str, GanConfig]:
    """The presets of a task; `paper` is the same for all."""
    changes = CALCIFICATION if task == "calcification" else {}
    return {n: replace(c, task=task, **changes.get(n, {})) for n, c in GAN_PRESETS.items()}


ADAM = {"betas": (0.0, 0.99), "eps": 1e-8}  # T1


def growth(config: GanConfig, step: int) -> tuple[int, float]:
    """Side of the images and weight of the new layer at a step (T3-T5)."""
    if step < config.iters_base:
        return config.patch_size // 2, 1.0  # no new layer yet
    faded = step - config.iters_base
    return config.patch_size, 1.0 if faded >= config.iters_fade else faded / config.iters_fade


class GanBatch(NamedTuple):
    """The patches of one step, (B, 1, s, s) in [-1, 1] each; what G reads is whole, s = S."""

    fake_source: Tensor  # what the fakes that D sees are made from
    real: Tensor
    benign: Tensor
    normal: Tensor
    sources: list[Tensor]  # fresh patches for G, for each of its updates


class GanBatches:
    """Draws the patches of each step from (seed, step)."""

    def __init__(self, config: GanConfig, data: Path, run: Run):
        self.config, self.run, self.ahead = config, run, ReadAhead(self.draw, config.steps)
        self.pools = [Patches.open(data, "train", name) for name in TASKS[config.task]]
        if config.batch_size % run.processes:
            raise ValueError(
                f"--batch-size {config.batch_size}: found {run.processes} processes; expected a "
                "batch that they share evenly"
            )

    def draw(self, step: int) -> list[Tensor]:
        """Source, real, benign and normal patches for D, then a source batch per G update (T2)."""
        rng, n = runs.numpy_rng(self.config.seed, step, runs.BATCH), self.config.batch_size
        source, real, benign, normal = self.pools
        pools = [source, real, benign, normal, *[source] * self.config.g_updates]
        rows = [rng.choice(len(pool), n, replace=False) for pool in pools]
        # Fakes come from other patches than the normal sub-batch, which is of their class (Q10).
        both = rng.choice(len(source), 2 * n, replace=False)
        rows[0], rows[3] = both[:n], both[n:]
        pairs = zip(pools, map(self.run.share, rows), strict=True)
        drawn = [torch.from_numpy(to_float(pool[row]))[:, None] for pool, row in pairs]
        return [x.pin_memory() for x in drawn] if self.run.device.type == "cuda" else drawn

    def at(self, step: int, size: int) -> GanBatch:
        """The patches of a step; D's are halved in the half-size stage, G's input never (Q11)."""
        drawn = [x.to(self.run.device, non_blocking=True) for x in self.ahead.at(step)]
        fake_source, *shown, sources = *drawn[:4], drawn[4:]
        if size < self.config.patch_size:
            shown = map(down2, shown)
        return GanBatch(fake_source, *shown, sources)


def networks(
    config: GanConfig, device: torch.device, init: Path | None = None
) -> tuple[Generator, Discriminator]:
    """G and D with the first weights of this seed, the same on every device; or those that a run
    of the same shape ended with (fine-tuning; ours)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runs.torch_rng(config.seed, 0, runs.WEIGHTS).initial_seed())
        G, D = generator(asdict(config)), discriminator(asdict(config))
    if init:
        with runs.checkpoint(init) as state:
            G.load_state_dict(state["watch"]["chosen"])
            D.load_state_dict(state["D"])
    layout = torch.channels_last
    return G.to(device, memory_format=layout), D.to(device, memory_format=layout)


def penalty_noise(config: GanConfig, x_real: Tensor, rng: torch.Generator, run: Run) -> Tensor:
    """delta ~ U(0, 1) for every pixel (L4), or that times half the patch's deviation (Q15)."""
    u = torch.empty(config.batch_size, *x_real.shape[1:], device=rng.device)
    delta = run.share(u.uniform_(0, 1, generator=rng))
    if config.gp_noise == "std":
        delta = delta * 0.5 * x_real.std(dim=(1, 2, 3), keepdim=True)
    return delta


def average_decay(decay: float, step: int) -> float:
    """Of an average of weights: short at first, when they change much; 0 = no average (Q11)."""
    return min(decay, (1 + step) / (10 + step))


def train_gan(
    config: GanConfig, data: Path, folder: Path, device: torch.device, init: Path | None = None
) -> None:
    """Train G and D of one task on the patch set `data` into the run `folder`.

    init: a finished run to start from
    Raises ValueError for data that do not fit, a foreign run, or a loss that is not finite.
    """
    with Run(folder, "train-gan", gan_facts(config, data, init), device, config.seed) as run:
        batches, n = GanBatches(config, data, run), config.batch_size
        G, D = networks(config, device, init)
        G_avg = copy.deepcopy(G).eval()  # the average of G's weights: what is watched and used
        opt_G = torch.optim.Adam(G.parameters(), lr=config.g_lr, fused=True, **ADAM)
        opt_D = torch.optim.Adam(D.parameters(), lr=config.d_lr, fused=True, **ADAM)
        watch = Watch(config, data, G_avg, run)
        run.resume(G=G, D=D, G_avg=G_avg, opt_G=opt_G, opt_D=opt_D, watch=watch)
        autocast = run.autocast(config.bfloat16)

        def update_D(size: int, alpha: float, source, real, benign, normal, z, delta) -> tuple:
            """ "given examples of all four classes for each update step" (L2, L3), in one pass, and
            the penalty at the real ones (L4)."""
            with torch.no_grad(), autocast:
                fake = G(source, z, size, alpha)[:, COMBINED]
            with autocast, parametrize.cached():  # D's spectral norm is estimated once for both
                logits = D(torch.cat([real, fake, benign, normal]), size, alpha).chunk(4)
                D_at = partial(D, size=size, alpha=alpha)
                penalty = gradient_penalty(D_at, real, delta=delta)
            loss = discriminator_loss(*logits)
            run.update(opt_D, loss + penalty)
            return loss, penalty, *logits

        def update_G(size: int, alpha: float, source: Tensor, z: Tensor) -> Tensor:
            """-log p_real of what G makes of fresh patches and noise (L5)."""
            D.requires_grad_(False)  # G learns, D stays as it is
            with autocast:
                fake = G(source, z, size, alpha)[:, COMBINED]
                loss = generator_loss(D(fake, size, alpha))
            run.update(opt_G, loss)
            D.requires_grad_(True)
            return loss

        step_D, step_G = Graph(update_D, run), Graph(update_G, run)
        for step in run.steps(config.steps):
            stage = size, alpha = growth(config, step)  # §2 Progressive growing
            batch = batches.at(step, size)
            rng = run.rng(step)  # of which several processes each use a share

            z = run.share(G.sample_noise(n, rng))
            delta = penalty_noise(config, batch.real, rng, run)
            loss_D, penalty, *logits = step_D(stage, *batch[:4], z, delta)
            for source in batch.sources:  # "For masses, we train the generator twice" (T2)
                loss_G = step_G(stage, source, run.share(G.sample_noise(n, rng)))
            update_average(G_avg, G, average_decay(config.g_average, step))

            # Log, samples, checkpoint
            run.record(loss_d=loss_D, penalty=penalty, loss_g=loss_G, **accuracies(logits))
            if run.due(config.log_every):
                row = watch.look(G_avg, D, batch.real + delta, size, alpha)
                row["seconds_waiting"] = round(batches.ahead.waited, 3)  # for data
                run.log(row, f"lesion share {row['lesion_share']:.3f}")
            if run.due(config.save_every):
                watch.draw(G_avg, size, alpha)
                run.save()
        run.finish(generator=runs.weights_hash(watch.chosen))


# --- §3 Patch Classifier Training ---


@dataclass(frozen=True)
class ClassifierConfig:
    """One regime of Table 1. Lengths count patches drawn, not steps (Q32)."""

    proportion: float = 0.0  # initial share of synthetic patches (C5, C6)
    seed: int = 0
    samples: int = 500_000  # patches drawn, real and synthetic (C3)
    batch_size: int = 32  # not given, Q32
    learning_rate: float = 1e-5  # C4
    decay: float = 0.9  # of the proportion, once every decay_every patches (C5; Q33)
    decay_every: int = 5_000  # C5
    evaluate_every: int = 5_000  # patches between two looks at the validation set (C7)
    weights: str = "imagenet"  # first weights: or "none", or a file (C1; Q31)
    network: str = "resnet50"  # C1, or "small", ours
    width: int = 16  # filters of the small network's first stage
    average: float = 0.0  # decay of the average of the weights that is used; 0 = none
    augment: str = ""  # or "classical": `classical` for every patch drawn; ours
    include_benign: bool = False  # benign patches as negatives (Q36)
    bfloat16: bool = True  # on a GPU: autocast; the CPU always computes in float32


CLASSIFIER_PRESETS = {
    "paper": ClassifierConfig(),
    # A ten times shorter schedule needs a higher rate; the decay keeps its place in the schedule.
    "cbis": ClassifierConfig(
        samples=50_000, learning_rate=1e-4, decay_every=500, evaluate_every=1_000
    ),
    # From random weights; on the validation part of a fold of CBIS masses the AUC was 0.72 after
    # 4,000 patches and 0.78 from 12,000 on, with classical augmentation 0.82 from 44,000 on.
    "tiny": ClassifierConfig(
        samples=40_000,
        learning_rate=1e-3,
        decay_every=400,
        evaluate_every=2_000,
        weights="none",
        network="small",
        average=0.99,
    ),
}
CLASSIFIER_PRESETS["cbis-cpu"] = CLASSIFIER_PRESETS["tiny"]

CLASSIFIER_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}  # C4; eps is not given


def synthetic_proportion(
    initial: float,
    samples_seen: int | np.ndarray,
    decay: float = ClassifierConfig.decay,
    every: int = ClassifierConfig.decay_every,
) -> float | np.ndarray:
    """Probability that the next patch is synthetic: initial * 0.9 ** (samples_seen // 5000) (C5).

    Multiplicative: "decayed by 10%" (Q33).
    """
    return initial * decay ** (samples_seen // every)


class ClassifierBatch(NamedTuple):
    x: Tensor  # (B, 1, S, S) in [-1, 1]
    y: Tensor  # (B,) 1 cancer, 0 none
    synthetic: Tensor  # share of the batch


class ClassifierBatches:
    """Draws the patches of each step from (seed, step)."""

    def __init__(self, config: ClassifierConfig, data: Path, sets: list[SyntheticSet], device):
        steps = -(-config.samples // config.batch_size)
        self.config, self.device, self.ahead = config, device, ReadAhead(self.draw, steps)
        negatives = ("normal", "benign") if config.include_benign else ("normal",)
        self.pools = {}  # (label, whether synthetic): patches
        for y, names in ((1, ("malignant",)), (0, negatives)):
            opened = [Patches.open(data, "train", name).parts for name in names]
            self.pools[y, False] = Patches({k: v for parts in opened for k, v in parts.items()})
            self.pools[y, True] = Patches({str(s.path): s.combined for s in sets if s.label == y})

    def draw(self, step: int) -> ClassifierBatch:
        """The label first, 1 or 0 with equal probability (C2); then synthetic or real with the
        probability of this very patch, for both classes (C5, Q34); then the patch, every one of
        the pool equally likely (Q35). A class without a synthetic set stays real.
        """
        config, first = self.config, step * self.config.batch_size
        n = min(config.batch_size, config.samples - first)
        rng = runs.numpy_rng(config.seed, step, runs.BATCH)
        labels, chance, which = rng.integers(2, size=n), rng.random(n), rng.random(n)
        seen = first + np.arange(n)
        p = synthetic_proportion(config.proportion, seen, config.decay, config.decay_every)
        possible = np.array([len(self.pools[y, True]) > 0 for y in (0, 1)])[labels]
        synthetic = (chance < p) & possible
        pools = [self.pools[key] for key in zip(labels.tolist(), synthetic.tolist(), strict=True)]
        drawn = [pool[int(u * len(pool))] for pool, u in zip(pools, which, strict=True)]
        x = torch.from_numpy(to_float(np.stack(drawn)))[:, None]
        x = classical(x, rng) if config.augment else x
        share = torch.tensor(synthetic.mean(), dtype=torch.float32)
        batch = ClassifierBatch(x, torch.from_numpy(labels), share)
        on_gpu = self.device.type == "cuda"
        return ClassifierBatch(*(t.pin_memory() for t in batch)) if on_gpu else batch

    def at(self, step: int) -> ClassifierBatch:
        x, y, synthetic = (t.to(self.device, non_blocking=True) for t in self.ahead.at(step))
        return ClassifierBatch(x.to(memory_format=torch.channels_last), y, synthetic)


def classical(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Patches (N, 1, S, S) flipped, turned by any quarter and up to 15 degrees, scaled by 0.9 to
    1.1, their contrast by 0.9 to 1.1, their brightness moved by up to 0.1 of [-1, 1] (ours)."""
    n = len(x)
    turn = np.pi / 2 * rng.integers(4, size=n) + np.radians(rng.uniform(-15, 15, n))
    flip, scale = rng.choice((-1, 1), n), rng.uniform(0.9, 1.1, n)
    contrast, brightness = rng.uniform(0.9, 1.1, n), rng.uniform(-0.1, 0.1, n)
    a, b, nought = np.cos(turn) / scale, np.sin(turn) / scale, np.zeros(n)
    theta = np.array([[flip * a, -flip * b, nought], [b, a, nought]]).transpose(2, 0, 1)
    grid = F.affine_grid(torch.from_numpy(theta.astype(np.float32)), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    light = torch.tensor(np.array([contrast, brightness]), dtype=x.dtype)[:, :, None, None, None]
    return (x * light[0] + light[1]).clamp(-1, 1)


class Best:
    """The weights "chosen based on performance on the validation set" (C7)."""

    def __init__(self):
        self.val_auc, self.samples_seen, self.weights = -1.0, 0, {}

    def keep(self, model: Classifier, val_auc: float, samples_seen: int) -> None:
        if val_auc > self.val_auc:
            self.val_auc, self.samples_seen = val_auc, samples_seen
            self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def validation_auc(model: Classifier, data: Path, device: torch.device) -> float:
    """AUC of the real validation patches, malignant against normal (C7)."""
    groups = [Patches.open(data, "val", name).parts for name in ("normal", "malignant")]
    scores = [[classifier_scores(model, v, device) for v in parts.values()] for parts in groups]
    normal, malignant = map(np.concatenate, scores)
    y = np.repeat([0, 1], [len(normal), len(malignant)])
    return float(roc_auc_score(y, np.concatenate([normal, malignant])))


def train_classifier(
    config: ClassifierConfig, data: Path, folder: Path, synthetic: list[Path], device: torch.device
) -> None:
    """Train one regime of Table 1 and keep the weights with the best validation AUC (C1-C7).

    Raises ValueError for a synthetic set that was not made from this patch set's training
    patients, for data that lack a class, a foreign run, or a loss that is not finite.
    """
    sets = usable_sets(config, data, synthetic)
    facts = classifier_facts(config, data, sets)
    with Run(folder, "train-cls", facts, device, config.seed) as run:
        if run.processes > 1:
            raise ValueError(f"train-cls: found {run.processes} processes; expected one")
        model = first_weights(config).to(device, memory_format=torch.channels_last)
        average = copy.deepcopy(model)  # of the weights: what is looked at and used
        optimizer = torch.optim.Adam(
            model.parameters(), lr=config.learning_rate, fused=True, **CLASSIFIER_ADAM
        )
        best, batches = Best(), ClassifierBatches(config, data, sets, device)
        run.resume(model=model, average=average, optimizer=optimizer, best=best)
        autocast = run.autocast(config.bfloat16)

        for step in run.steps(config.samples, by=config.batch_size):
            batch = batches.at(step)  # synthetic patches in the proportion of this moment (C5)
            with autocast:
                loss = F.cross_entropy(model(batch.x).float(), batch.y)
            run.update(optimizer, loss)
            update_average(average, model, average_decay(config.average, step))
            run.record(loss=loss, synthetic_share=batch.synthetic)

            if run.due(config.evaluate_every):
                seen = min((step + 1) * config.batch_size, config.samples)
                row = {"samples_seen": seen, **run.averages()}
                row["val_auc"] = val_auc = validation_auc(average, data, device)
                row["seconds_waiting"] = round(batches.ahead.waited, 3)  # for data
                best.keep(average, val_auc, seen)
                run.log(row, f"validation AUC {val_auc:.3f}")
                run.save()
        run.finish(best={"val_auc": best.val_auc, "samples_seen": best.samples_seen})


def first_weights(config: ClassifierConfig) -> Classifier:
    """The classifier "initialized with weights trained from ImageNet" (C1), or as --weights says.

    The head is always new. Raises ValueError when the weights cannot be had or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runs.torch_rng(config.seed, 0, runs.WEIGHTS).initial_seed())
        model = classifier(asdict(config))
    if config.weights == "none":
        text = "WARNING: random first weights; the paper starts from ImageNet's (C1)"
        runs.say_once(click.style(text, fg="red"))
    else:
        imagenet.load(model, config.weights)
    return model


@torch.inference_mode()
def classifier_scores(
    model: Classifier,
    patches: np.ndarray,
    device: torch.device,
    batch: int = 64,
    features: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """uint16 (N, S, S) -> p(cancer) (N,), with `features` also the pooled features (N, F)."""
    model.eval()
    scores, pooled = [], []
    for start in range(0, len(patches), batch):
        x = torch.from_numpy(to_float(patches[start : start + batch]))[:, None].to(device)
        h = model.features(x)
        scores.append(model.fc(h).softmax(dim=1)[:, 1].cpu().numpy())
        pooled.append(h.cpu().numpy())
    scores = np.concatenate(scores)
    return (scores, np.concatenate(pooled)) if features else scores


def load_classifier(run: Path, device: torch.device) -> tuple[Classifier, dict]:
    """The classifier with its best weights (C7) of a finished run: (model in eval mode, config)."""
    config = runs.finished(run, "train-cls")["config"]
    with runs.checkpoint(run) as state:
        model = classifier(config)
        model.load_state_dict(state["best"]["weights"])
    return model.to(device).eval(), config
