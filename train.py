"""§2 Training details, Progressive growing; §3 Patch Classifier Training: configurations and loops.

Each step's batch and noise are drawn from (seed, step): a run that was stopped and started again
equals one that was not, bitwise on the CPU.
"""

import contextlib
import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.utils import parametrize

from data import TASKS, to_float
from models import (
    Discriminator,
    Generator,
    PatchClassifier,
    discriminator_loss,
    down2,
    generator_loss,
    gradient_norm,
    norm_penalty,
    update_average,
)
from support.files import sha256
from support.patchset import (
    Pool,
    SyntheticSet,
    check_synthetic,
    open_synthetic,
    patch_config,
)
from support.runs import (
    BATCH,
    NOISE,
    WEIGHTS,
    ReadAhead,
    World,
    finish_folder,
    finished_config,
    generator_at,
    open_log,
    progress,
    read_torch,
    restore,
    restoring,
    save_checkpoint,
    stop_requested,
    torch_seed,
    training,
    weights_hash,
)
from support.watch import RECORDED, Watch, plot_log

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
    g_accepted: float = 0.0  # of the second half of the last stage use the last G of which so many
    # validation lesions pass S3 to S5, or else the one of which most do; 0 = the last
    bfloat16: bool = True  # on a GPU: autocast; the CPU always computes in float32
    channels_last: bool = True  # layout of images and weights; another order of the same sums
    log_every: int = 100  # steps between rows of log.jsonl
    save_every: int = 1_000  # steps between checkpoints, sample grids and gan.png


# What the small presets change beyond size, each with its measurement (docs/PAPER.md):
SMALL = {
    "sn_d": False,  # with it the loss of D stayed at chance, 3.0 to 3.4 for 400 steps; without 2.6
    "g_lr": 2e-4,  # the lesions are local after 600 steps; with 4e-4 they had faded by then
    "d_lr": 2e-4,  # 5e-4 and 1e-3 left fewer lesions over the threshold (0.13 and 0.19 for 0.31)
    "g_updates_mass": 1,  # the second costs a quarter of a step's time
    "gp_noise": "std",  # with U(0, 1) at most 0.06 of the lesions passed after 600 steps, not 0.28
    "g_accepted": 0.3,  # acceptance wavered between 0.02 and 0.36 within 300 steps
    "g_average": 0.99,  # evens out steps this long; not measured alone
}
GAN_PRESETS = {
    "paper": GanConfig(),
    "cbis": GanConfig(
        **SMALL, patch_size=128, d_base=64, d_center=8192, iters_base=4_000, iters_final=8_000
    ),
    "tiny": GanConfig(
        **SMALL,
        patch_size=64,
        g_base=8,
        g_center=1024,
        d_base=16,  # twice the filters of G: eight times cost too much time on two cores
        d_center=2048,
        iters_base=300,
        iters_fade=100,
        iters_final=1_400,
        log_every=50,
        save_every=200,
    ),
}

ADAM = {"betas": (0.0, 0.99), "eps": 1e-8}  # T1


class Batches(ReadAhead):
    """The patches of each step, drawn from (seed, step)."""

    def __init__(self, config: GanConfig, data: Path, pinned: bool):
        super().__init__(config, config.iters_base + config.iters_fade + config.iters_final)
        self.pinned = pinned
        self.pools = [Pool.open(data, "train", name) for name in TASKS[config.task]]
        self.shared = TASKS[config.task].index(TASKS[config.task][0], 1)  # D's class that G reads
        for i, pool in enumerate(self.pools):
            least = config.batch_size * (2 if i in (0, self.shared) else 1)
            if len(pool) < least:
                raise ValueError(
                    f"{data}: {pool.name} holds {len(pool)} patches; expected at least {least} for "
                    f"--batch-size {config.batch_size}; prepare more or lower it"
                )
        # One source batch for D, then one for each G update (T2)
        self.pools += self.pools[:1] * (config.g_updates_mass if config.task == "mass" else 1)

    def draw(self, step: int) -> list[Tensor]:
        """D's sub-batches [source, real, benign, normal], then a source batch per G update.

        (B, 1, S, S) in [-1, 1] each, B this process's share of the batch.
        """
        rng, n = generator_at(self.config.seed, step, BATCH), self.config.batch_size
        rows = [rng.choice(len(pool), n, replace=False) for pool in self.pools]
        # Fakes come from other patches than the sub-batch of the same class (Q10).
        both = rng.choice(len(self.pools[0]), 2 * n, replace=False)
        rows[0], rows[self.shared] = both[:n], both[n:]
        drawn = [p.take(self.world.share(r)) for p, r in zip(self.pools, rows, strict=True)]
        return [x.pin_memory() for x in drawn] if self.pinned else drawn


def growth(config: GanConfig, step: int) -> tuple[int, float]:
    """(side of the images, weight of the new layer) at a step (T3-T5)."""
    if step < config.iters_base:
        return config.patch_size // 2, 1.0
    faded = step - config.iters_base
    return config.patch_size, 1.0 if faded >= config.iters_fade else faded / config.iters_fade


def networks(config: GanConfig, device: torch.device) -> tuple[Generator, Discriminator]:
    """G and D with the first weights of this seed, the same on every device."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.seed, 0, WEIGHTS))
        G = Generator(config.patch_size, config.g_base, config.g_center, config.sn_g)
        D = Discriminator(config.patch_size, config.d_base, config.d_center, config.sn_d)
    return G.to(device, memory_format=layout), D.to(device, memory_format=layout)


def train_gan(config: GanConfig, data: Path, run: Path, device: torch.device) -> None:
    """Train G and D of one task on the patch set `data` into the folder `run`.

    Started again after an interruption it goes on from `run/checkpoint.pt`.
    Raises ValueError for data that do not fit, a foreign run, or a loss that is not finite.
    """
    patches = patch_config(data)
    if patches["patch_size"] != config.patch_size:
        raise ValueError(
            f"{data}: holds patches of {patches['patch_size']} px, the preset trains on "
            f"{config.patch_size} px; give the preset that prepared them"
        )
    facts = asdict(config) | {"data": patches["fingerprint"]}
    facts["spacing_mm"] = patches["spacing_mm"]  # what a pixel of full mammograms must become
    batches = Batches(config, data, pinned=device.type == "cuda")
    if not batches.steps:
        raise ValueError(
            "--iters-base, --iters-fade, --iters-final: found 0 steps; give at least 1"
        )
    watch = Watch(config, data, device)
    with contextlib.ExitStack() as stack:
        stack.callback(batches.reader.shutdown)
        world = stack.enter_context(training(run, "train-gan", facts, config.batch_size, device))
        batches.world, end = world, batches.steps

        # Networks, optimisers, and where an earlier run stopped
        G, D = networks(config, device)
        opt_G = torch.optim.Adam(G.parameters(), lr=config.g_lr, fused=True, **ADAM)
        opt_D = torch.optim.Adam(D.parameters(), lr=config.d_lr, fused=True, **ADAM)
        average, chosen = copy.deepcopy(G), copy.deepcopy(G)
        parts = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D}
        parts |= {"average": average, "chosen": chosen}  # what is watched, what is used
        best, start, recorded, since, text = 0.0, 0, [], time.time(), ""
        if (run / "checkpoint.pt").exists() or (run / "checkpoint-previous.pt").exists():
            with restoring(run) as state:
                for name, part in parts.items():
                    restore(part, state[name])
                start = range(end + 1).index(state["step"])
                recorded = [r.reshape(len(RECORDED)).to(device) for r in state["recorded"]]
                best, watch.lasting = float(state["best"]), dict(state["lasting"])
        autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=config.bfloat16 and device.type == "cuda"
        )
        B = config.batch_size // world.size
        log = advance = None  # the first process alone writes and speaks
        if world.rank == 0:
            log = stack.enter_context(open_log(run, start))
            advance = stack.enter_context(progress(end, f"train-gan {config.task}", done=start))
        stop = stack.enter_context(stop_requested())

        for step in range(start, end):
            # Batch: patches and noise of this step, at the side of this stage
            size, alpha = growth(config, step)
            tensors = [x.to(device, non_blocking=True) for x in batches.at(step)]
            source, real, benign, normal = tensors[:4]
            if size < config.patch_size:
                real, benign, normal = down2(real), down2(benign), down2(normal)
            rng = torch.Generator(device).manual_seed(torch_seed(config.seed, step, NOISE))
            z = torch.empty(len(batches.pools) - 3, B * world.size, 2 * G.blocks, device=device)
            z.uniform_(-1, 1, generator=rng)
            delta = torch.empty(B * world.size, *real.shape[1:], device=device)
            delta = world.share(delta.uniform_(0, 1, generator=rng))
            if config.gp_noise == "std":
                delta *= 0.5 * real.std(dim=(1, 2, 3), keepdim=True)

            # D: four classes at once, then the penalty on the real ones (L3, L4)
            with torch.no_grad(), autocast:
                fake = G(source, world.share(z[0]), size, alpha)[:, 2:]
            with autocast, parametrize.cached():  # one power iteration for both passes
                logits = D(torch.cat([real, fake, benign, normal]), size, alpha).split(B)
                norm = gradient_norm(lambda x: D(x, size, alpha), real, delta)  # noqa: B023
            loss_D = discriminator_loss(*logits)
            penalty = norm_penalty(norm)
            opt_D.zero_grad()
            (loss_D + penalty).backward()
            world.average([p.grad for p in D.parameters() if p.grad is not None])
            opt_D.step()

            # G: fresh patches and noise for each update (T2, L5)
            D.requires_grad_(False)
            for x, z_x in zip(tensors[4:], z[1:], strict=True):
                with autocast:
                    fake = G(x, world.share(z_x), size, alpha)[:, 2:]
                    loss_G = generator_loss(D(fake, size, alpha))
                opt_G.zero_grad()
                loss_G.backward()
                world.average([p.grad for p in G.parameters() if p.grad is not None])
                opt_G.step()
            D.requires_grad_(True)
            update_average(average, G, min(config.g_average, (1 + step) / (10 + step)))

            # Log and save
            with torch.no_grad():
                right = [(x.argmax(1) == i).float().mean() for i, x in enumerate(logits)]
                recorded.append(torch.stack([loss_D, penalty, norm.mean(), loss_G, *right]))
            done = step + 1
            stopping = world.any(stop(), device)
            logging = done % config.log_every == 0 or done == end
            showing = done % config.save_every == 0 or done == end
            if logging or showing or stopping:
                recorded = checked(recorded, done, [*G.parameters(), *D.parameters()], world)
            if logging and log:
                figures, _ = watch.look(average, size, alpha)
                row = {"step": done, "side": size, "alpha": alpha}
                row |= dict(zip(RECORDED, torch.stack(recorded).mean(0).tolist(), strict=True))
                attention = (G.encoder_attention, G.decoder_attention, D.attention)
                row |= {"gamma": [a.gamma.item() for a in attention]} | figures
                # Candidates: the second half of the last stage. Coarse changes pass S5 before it.
                late = done > end - config.iters_final / 2
                row["chosen"] = not late or figures["acceptance"] >= min(best, config.g_accepted)
                if row["chosen"]:
                    chosen.load_state_dict(average.state_dict())
                    best = max(best, figures["acceptance"]) if late else 0.0
                row |= {"warnings": watch.warnings(row), "seconds": round(time.time() - since, 3)}
                row["seconds_waiting"] = round(batches.waited, 3)  # for data, since this start
                log(row)
                since = time.time()
                text = f"lesion share {row['lesion_share']:.3f}"
            if logging:
                recorded = []
            if showing and log:  # before the checkpoint: what a kill leaves out is made again
                watch.grid(watch.look(average, size, alpha)[1], run / f"samples/{done:06d}.png")
                plot_log(run)
            if (showing or stopping) and log:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"step": done, "recorded": recorded, "best": best}
                state["lasting"] = watch.lasting
                save_checkpoint(run, state)
            if advance:
                advance(1, text)
            world.wait()  # none leaves while the first one writes
            if stopping and done < end:
                raise KeyboardInterrupt

        if world.rank == 0:
            (run / "checkpoint-previous.pt").unlink(missing_ok=True)
            versions = {"torch": torch.__version__, "numpy": np.__version__}
            finish_folder(run, generator=weights_hash(chosen), versions=versions)


def checked(recorded: list[Tensor], done: int, weights: list[Tensor], world: World) -> list[Tensor]:
    """The figures of the last steps, the mean over processes.

    Raises ValueError naming loss and step when one, or a weight, is not finite.
    """
    values = torch.stack(recorded)
    world.average([values])
    found = None
    if bad := (~values.isfinite()).nonzero().tolist():
        row, column = bad[0]
        found = done - len(recorded) + row + 1, RECORDED[column], values[row, column].item()
    elif not all(w.isfinite().all() for w in weights):
        found = done, "a weight", "not finite"
    if found:
        raise ValueError(
            f"step {found[0]}: {found[1]} is {found[2]}; expected finite values; the checkpoint "
            "holds the last good state; lower the learning rates"
        )
    return list(values)


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
    width: int = 64  # ResNet-50's; smaller for the CPU
    blocks: tuple[int, ...] = (3, 4, 6, 3)  # ResNet-50's
    include_benign: bool = False  # benign patches as negatives (Q36)
    bfloat16: bool = True  # on a GPU: autocast; the CPU always computes in float32


CLASSIFIER_PRESETS = {
    "paper": ClassifierConfig(),
    # A ten times shorter schedule needs a higher rate; the decay keeps its place in the schedule.
    "cbis": ClassifierConfig(
        samples=50_000, learning_rate=1e-4, decay_every=500, evaluate_every=1_000
    ),
    # A quarter of the width, from random weights: on CBIS masses the validation AUC was 0.64
    # after 6,000 patches, 0.72 after 15,000, and 0.74 to 0.81 from 24,000 to 48,000.
    "tiny": ClassifierConfig(
        samples=40_000,
        learning_rate=1e-3,
        decay_every=400,
        evaluate_every=2_000,
        weights="none",
        width=16,
    ),
}

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


class ClassifierBatches(ReadAhead):
    """The patches of each step, drawn from (seed, step)."""

    def __init__(self, config: ClassifierConfig, data: Path, sets: list[SyntheticSet]):
        super().__init__(config, -(-config.samples // config.batch_size))
        real = {1: [Pool.open(data, "train", "malignant")], 0: [Pool.open(data, "train", "normal")]}
        if config.include_benign:
            real[0].append(Pool.open(data, "train", "benign"))
        self.pools = {(y, False): Pool([a for p in real[y] for a in p.parts]) for y in (0, 1)}
        self.pools |= {(y, True): Pool([s.combined for s in sets if s.label == y]) for y in (0, 1)}

    def draw(self, step: int) -> tuple[Tensor, Tensor, int]:
        """Patches (B, 1, S, S), labels (B,) and how many are synthetic.

        The label first, 1 or 0 with equal probability (C2); then synthetic or real with the
        probability of this very patch, for both classes (C5, Q34); then the patch, every one of
        the pool equally likely (Q35). A class without a synthetic set stays real.
        """
        first = step * self.config.batch_size
        n = min(self.config.batch_size, self.config.samples - first)
        rng = generator_at(self.config.seed, step, BATCH)
        labels, chance, place = rng.integers(2, size=n), rng.random(n), rng.random(n)
        p = synthetic_proportion(
            self.config.proportion,
            first + np.arange(n),
            self.config.decay,
            self.config.decay_every,
        )
        possible = np.array([len(self.pools[y, True]) > 0 for y in (0, 1)])[labels]
        synthetic = (chance < p) & possible
        x = torch.empty(0)
        for key, pool in self.pools.items():
            rows = np.flatnonzero((labels == key[0]) & (synthetic == key[1]))
            if len(rows):
                drawn = pool.take((place[rows] * len(pool)).astype(int))
                x = x if len(x) else drawn.new_empty(n, *drawn.shape[1:])
                x[rows] = drawn
        return x, torch.from_numpy(labels), int(synthetic.sum())


def validation_auc(model: PatchClassifier, data: Path, device: torch.device) -> float:
    """AUC of the real validation patches, malignant against normal (C7)."""
    groups = [Pool.open(data, "val", name).parts for name in ("normal", "malignant")]
    scores = [classifier_scores(model, part, device) for parts in groups for part in parts]
    labels = [int(i > 0) for i, parts in enumerate(groups) for _ in parts]
    y = np.repeat(labels, [len(s) for s in scores])
    return float(roc_auc_score(y, np.concatenate(scores)))


def train_classifier(
    config: ClassifierConfig, data: Path, run: Path, synthetic: list[Path], device: torch.device
) -> None:
    """Train one regime of Table 1 and keep the weights with the best validation AUC (C1-C7).

    Started again after an interruption it goes on from `run/checkpoint.pt`.
    Raises ValueError for a synthetic set that was not made from this patch set's training
    patients, for data that lack a class, a foreign run, or a loss that is not finite.
    """
    sets = [open_synthetic(path) for path in synthetic]
    for s in sets:
        check_synthetic(s, data)
    if len({s.control for s in sets}) > 1:
        found = ", ".join(f"{s.path} ({s.control or 'GAN'})" for s in sets)
        raise ValueError(f"--synthetic: found {found}; expected sets of GANs or of a control alone")
    if bool(config.proportion) != any(s.label for s in sets):
        raise ValueError(
            f"--proportion {config.proportion}: found {len(sets)} --synthetic sets; expected a "
            "proportion above 0 together with a mass or calcification set, or neither"
        )
    facts = asdict(config) | {
        "data": patch_config(data)["fingerprint"],
        "synthetic": [
            {"task": s.task, "control": s.control, "short": s.short, "samples": len(s.combined)}
            | {"generator": s.generator, "fingerprint": s.fingerprint}
            for s in sets
        ],
    }
    if config.weights not in ("imagenet", "none"):
        facts["weights"] = f"file {sha256(Path(config.weights))[:16]}"
    batches = ClassifierBatches(config, data, sets)
    with torch.random.fork_rng(devices=[]):  # before the folder is taken: weights may be missing
        torch.manual_seed(torch_seed(config.seed, 0, WEIGHTS))
        model = classifier(config.width, config.blocks, config.weights)
    with contextlib.ExitStack() as stack:
        stack.callback(batches.reader.shutdown)
        world = stack.enter_context(training(run, "train-cls", facts, config.batch_size, device))
        if world.rank == 0:
            if config.weights == "none":
                warning = "WARNING: random first weights; the paper starts from ImageNet's (C1)"
                click.secho(warning, fg="red", err=True)
            if sets and all(s.label for s in sets):
                click.echo("no removal set: synthetic patches replace positives only", err=True)

        # Network, optimiser, and where an earlier run stopped
        model = model.to(device, memory_format=torch.channels_last)
        if world.size > 1 and device.type == "cuda":  # on the CPU each process has its own means
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimizer = torch.optim.Adam(
            model.parameters(), lr=config.learning_rate, fused=True, **CLASSIFIER_ADAM
        )
        start, sums = 0, torch.zeros(2, dtype=torch.float64, device=device)  # loss, synthetic
        best = {"val_auc": -1.0, "samples_seen": 0, "looked_at": 0, "weights": {}}
        if (run / "checkpoint.pt").exists() or (run / "checkpoint-previous.pt").exists():
            with restoring(run) as state:
                model.load_state_dict(state["model"])
                restore(optimizer, state["optimizer"])
                start = range(batches.steps + 1).index(state["step"])
                best |= state["best_so_far"] | {"weights": dict(state["best"])}
                sums.copy_(state["sums"])
        autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=config.bfloat16 and device.type == "cuda"
        )
        log = stack.enter_context(open_log(run, start)) if world.rank == 0 else None
        stop = stack.enter_context(stop_requested())
        seen, since, text = start * config.batch_size, time.time(), ""
        advance = stack.enter_context(progress(config.samples, "train-cls", done=seen))

        for step in range(start, batches.steps):
            # Batch
            x, labels, synthetic_drawn = batches.at(step)
            share = world.share if len(x) == config.batch_size else lambda t: t
            x = share(x).to(device, non_blocking=True, memory_format=torch.channels_last)
            y = share(labels).to(device)

            # Update
            model.train()
            with autocast:
                loss = F.cross_entropy(model(x).float(), y)
            optimizer.zero_grad()
            loss.backward()
            world.average([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()

            # Look at the validation set, log and save
            before, seen = seen, seen + len(labels)
            sums += torch.stack([loss.detach() * len(labels), loss.new_tensor(synthetic_drawn)])
            stopping = world.any(stop(), device)
            looking = before // config.evaluate_every < seen // config.evaluate_every
            looking = looking or step + 1 == batches.steps
            if looking or stopping:
                world.average([sums])
                if not sums.isfinite().all():
                    raise ValueError(
                        f"step {step + 1}: the loss is {sums[0].item()}; expected finite values; "
                        "the checkpoint holds the last good state; lower --learning-rate"
                    )
            if looking:
                auc, drawn = validation_auc(model, data, device), seen - best["looked_at"]
                text = f"validation AUC {auc:.3f}"
                if log:
                    row = {"step": step + 1, "samples_seen": seen, "val_auc": auc}
                    row |= {"loss": sums[0].item() / drawn, "drawn": drawn}
                    row |= {"synthetic_share": sums[1].item() / drawn}
                    log(
                        row
                        | {"seconds_waiting": round(batches.waited, 3)}
                        | {"seconds": round(time.time() - since, 3)}
                    )
                if auc > best["val_auc"]:
                    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
                    best |= {"val_auc": auc, "samples_seen": seen, "weights": weights}
                best["looked_at"], since = seen, time.time()
                sums.zero_()
            if (looking or stopping) and log:
                state = {"step": step + 1, "sums": sums, "model": model.state_dict()}
                state |= {"optimizer": optimizer.state_dict(), "best": best["weights"]}
                state["best_so_far"] = {k: v for k, v in best.items() if k != "weights"}
                save_checkpoint(run, state)
            world.wait()  # none leaves while the first one writes
            if stopping and step + 1 < batches.steps:
                raise KeyboardInterrupt
            advance(len(labels), text)

        if world.rank == 0:
            (run / "checkpoint-previous.pt").unlink(missing_ok=True)
            versions = {"torch": torch.__version__, "numpy": np.__version__}
            best = {k: best[k] for k in ("val_auc", "samples_seen")}
            finish_folder(run, best=best, versions=versions)


def classifier(
    width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3), weights: str = "imagenet"
) -> PatchClassifier:
    """The classifier with its first weights: "imagenet" (C1), "none", or a file of them.

    The head is always new. Raises ValueError when the weights cannot be had or do not fit.
    """
    model = PatchClassifier(width, blocks)
    if weights == "none":
        return model
    if weights == "imagenet":
        if width != 64 or tuple(blocks) != (3, 4, 6, 3):
            raise ValueError(
                f"--weights imagenet: found a ResNet of width {width} and blocks {tuple(blocks)}; "
                "the ImageNet weights fit ResNet-50 (presets paper, cbis) only; "
                "give --weights none or a file"
            )
        try:
            source = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
            state = source.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"--weights imagenet: the weights could not be loaded ({error}); "
                "give --weights FILE (torchvision's ResNet-50 weights) or --weights none"
            ) from None
    else:
        state = read_torch(Path(weights))
        state = state.get("model", state)
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"{weights}: weights of another network ({error})") from None
    if unexpected or set(missing) != {"fc.weight", "fc.bias"}:
        raise ValueError(
            f"{weights}: expected the weights of a torchvision ResNet; "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return model


@torch.inference_mode()
def classifier_scores(
    model: PatchClassifier,
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
        if features:
            pooled.append(h.cpu().numpy())
    if features:
        return np.concatenate(scores), np.concatenate(pooled)
    return np.concatenate(scores)


def load_classifier(run: Path, device: torch.device) -> tuple[PatchClassifier, dict]:
    """The classifier with its best weights (C7) of a finished run: (model in eval mode, config)."""
    config = finished_config(run, "train-cls")
    with restoring(run) as state:
        model = PatchClassifier(config["width"], tuple(config["blocks"]))
        model.load_state_dict(state["best"])
    return model.to(device).eval(), config
