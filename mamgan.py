#!/usr/bin/env python3
"""Contextual lesion GANs on mammograms: prepare, train-gan, synthesize, train-cls, evaluate, demo.

After "Synthesizing lesions using contextual GANs improves breast cancer classification on
mammograms" (Wu, Wu, Lotter 2020). Research only; not for clinical use.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the libraries load

import dataclasses
import os
import shlex
import sys
from pathlib import Path

import click
import torch

import data
import train
from postprocess import DILATE_PX, SMOOTH_SIGMA, NothingAccepted, synthesize_set
from support import fullimage, patchset, phantom, report, runs, sources

# --- Command line: one clear message and exit code 1 for bad data, 2 for wrong usage ---

CARD_TOO_SMALL = (  # an H100's peak; arithmetic of benchmarks/bench_memory.py, half as much again
    "train-gan --preset paper takes 11 GiB: on 12 GB give --batch-size 4, on 8 GB 2, in a new "
    "folder and without --no-bfloat16; train-cls takes 4. Or free the card, or give --device cpu."
)


class Commands(click.Group):
    """Turns what can go wrong with files into one message, and Ctrl-C into how to go on."""

    def invoke(self, ctx: click.Context) -> object:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            raise click.ClickException("stopped; the same command goes on from here") from None
        except torch.OutOfMemoryError as error:
            text = ". ".join(str(error).partition("\n")[0].split(". ")[:3]).rstrip(". ")
            raise click.ClickException(f"{text}. {CARD_TOO_SMALL}") from None
        except (ValueError, OSError) as error:
            raise click.ClickException(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        hint = {28: "free some space", 30: "give a folder that can be written"}.get(error.errno)
        return f"{where}{error.strerror}{f'; {hint}, then run it again' if hint else ''}"
    return str(error)


FOLDER = click.Path(path_type=Path)
COMPONENT = "largest: one object, as the paper (S4); cluster: grains, for calcifications (Q27)."
COUNTS = (
    "Patches of one class in one split; repeat. Paper: train/normal=400000, malignant_mass 42280, "
    "benign_mass 3500, malignant_calcification 24100, benign_calcification 6580 (P4); in val and "
    "in test 1000 each of normal and the malignant ones (P5)."
)
NORMALS = (
    "Normal patches of women without any finding (A4), of any image without one, or also of "
    "annotated images, off the boxes.  [paper studies, the others images]"
)
BIRADS = "VinDr-Mammo, INbreast: BI-RADS 4 to 6 stand for malignant, 2 and 3 for benign."
FORMATS = click.Choice(["manifest", *sources.READERS])
COUNT, SHARE = click.IntRange(1), click.FloatRange(0, 1)
LENGTH, POSITIVE = click.FloatRange(0), click.FloatRange(0, min_open=True)
RANGES = {  # of the options that override a preset; other whole numbers begin at 1
    **dict.fromkeys(("iters_base", "iters_fade", "iters_final", "noise_cells"), click.IntRange(0)),
    **dict.fromkeys(("g_lr", "d_lr", "learning_rate"), POSITIVE),
    "spacing_mm": LENGTH,
    "bits": click.IntRange(2, 16),
    "g_average": SHARE,
    "decay": SHARE,
    "gp_noise": click.Choice(["uniform", "std"]),
    "augment": click.Choice(["classical"]),
}


def option(flags: str, kind: object, text: str | None, **more: object):
    """click's option, its type and help in one line; `flags` may name the parameter, too."""
    return click.option(*flags.split(), type=kind, help=text, **more)


def preset_options(presets: dict, texts: dict[str, str]):
    """Options that override one field of a preset each; the help states every preset's value."""

    def decorate(command):
        for name, text in reversed(texts.items()):
            values = {preset: getattr(config, name) for preset, config in presets.items()}
            known = next((v for v in values.values() if v is not None), None)
            shown = ", ".join(f"{p} {'none' if v == '' else v}" for p, v in values.items())
            flag = "--" + name.replace("_", "-")
            kind = RANGES.get(name, COUNT if type(known) is int else type(known))
            flag, kind = (f"{flag}/--no-{flag[2:]}", None) if kind is bool else (flag, kind)
            command = option(flag, kind, f"{text}  [{shown}]", default=None)(command)
        text = "A whole configuration: the paper's; 128 px for a GPU or the CPU; 64 px for the CPU."
        return option("--preset", click.Choice(list(presets)), text, default="paper")(command)

    return decorate


def configure(presets: dict, preset: str, overrides: dict, **fixed: object):
    """The preset with the options that were given; every field stays in the frozen dataclass."""
    given = {key: value for key, value in overrides.items() if value is not None}
    return dataclasses.replace(presets[preset], **given, **fixed)


seed_option = option("--seed", click.IntRange(0), "Of every random draw.", default=0)
device_option = option("--device", click.Choice(["auto", "cpu", "cuda"]), None, default="auto")


@click.group(cls=Commands, context_settings={"show_default": True, "max_content_width": 100})
def cli() -> None:
    """Synthetic lesions on mammograms with contextual GANs, and whether they help a classifier.

    Research only; not for clinical use. Every command goes on after an interruption when it is
    given again, and refuses a folder that was made with other options.
    """


# --- §3 Dataset details ---


@cli.command()
@click.argument("source", type=FOLDER)
@option("--out", FOLDER, "Patch set to write.", required=True)
@option("--format source_format", FORMATS, "Of SOURCE: manifest or data set.", default="manifest")
@preset_options(
    data.PREPARE_PRESETS,
    {
        "spacing_mm": "Resample to this spacing; 0 keeps native pixels, as the paper (Q19).",
        "bits": "Bits that the values of images without window or LUT use; else all of the file's.",
        "pseudonymise": "Hash patient ids and paths with the key in MAMGAN_PSEUDONYM_KEY.",
    },
)
@option("--count counts", None, COUNTS, multiple=True, metavar="SPLIT/CLASS=N")
@option("--birads-as-pathology birads", bool, BIRADS, is_flag=True)
@option("--normals", click.Choice(["studies", "images", "annotated"]), NORMALS)
@option("--fold", None, "Fold K (1 to N) tests, K+1 validates, the rest trains.", metavar="K/N")
@option("--malignant-share", SHARE, "Keep so many of the training patients with cancer.")
@option("--distinct-ids distinct", bool, "Ids such as 7 and 007 are two patients.", is_flag=True)
@option("--qc", click.IntRange(0), "Contact sheet of so many images, qc.png.", default=0)
@option("--workers", COUNT, "Any number writes the same bytes.", default=os.cpu_count() or 1)
@seed_option
def prepare(
    source, out, source_format, preset, counts, birads, distinct, qc, workers, seed, **options
):
    """Mammograms with annotations -> patch set (P1 to P9).

    SOURCE is a manifest or the folder of a public data set. Patients are split 60/20/20 (P2);
    windows hold at least 90% breast tissue (P6); those for training are scaled by 0.8 to 1.2,
    flipped and rotated (P7); lesions lie anywhere in theirs (P8). Patches have 256 px in preset
    paper (P9), 128 in cbis and cbis-cpu, 64 in tiny.

    Cross-validation: --fold K/N deals patients into N folds by the seed alone, stratified as the
    splits; fold K (of 1 to N) is tested, fold K+1 (after N the first) validates, the others train.
    Scarcity: --malignant-share 0.1 leaves out all but a tenth of the training patients with cancer,
    wholly; those kept are among those kept at 0.25, and validation and test stay the same.
    """
    if source_format == "manifest":
        if birads:
            raise click.UsageError("--birads-as-pathology needs --format vindr or inbreast")
        findings, notes = sources.read_manifest(source), []
    else:
        findings, notes = sources.READERS[source_format](source, birads)
    for note in notes:
        click.echo(note, err=True)
    if not distinct:
        advice = "write a patient's id in one way; --distinct-ids if they are different patients"
        sources.raise_all(f"{source}: patients: found", sources.look_alikes(findings), advice)
    config = configure(data.PREPARE_PRESETS, preset, options, seed=seed).with_counts(counts)
    patchset.prepare(findings, out, config, workers, qc, notes, source_format)


# --- §2 Contextual GAN ---


@cli.command("train-gan")
@option("--task", click.Choice(list(data.TASKS)), "One GAN each (G14).", required=True)
@option("--data patches", FOLDER, "Patch set of prepare.", required=True)
@option("--run", FOLDER, "Run folder to write.", required=True)
@option("--init", FOLDER, "Start from the networks of this run (fine-tuning), of the same shape.")
@preset_options(
    train.GAN_PRESETS,
    {
        "batch_size": "Patches of each of the four classes a step; the paper names none (Q18).",
        "iters_base": "Steps at half size; the paper names none (Q18).",
        "iters_fade": "Steps of the fade to full size (T5).",
        "iters_final": "Steps at full size after it; the paper names none (Q18).",
        "g_lr": "Learning rate of the generator (T1).",
        "d_lr": "Learning rate of the discriminator (T1).",
        "g_updates_mass": "Generator updates per discriminator update for masses (T2).",
        "g_base": "Filters of the generator's first block (G3).",
        "g_center": "Channels of its 4 x 4 centre (G8, Q1).",
        "d_base": "Filters of the discriminator's first block (D1).",
        "d_center": "Channels of its 4 x 4 centre.",
        "noise_cells": "One noise value a cell on maps of this side or less; 0: scalars (G5, Q2).",
        "sn_g": "Spectral normalisation of the generator (G16).",
        "sn_d": "Spectral normalisation of the discriminator (G16).",
        "gp_noise": "Noise of the gradient penalty: uniform as printed, or std (L4, Q15).",
        "g_average": "Decay of the average of the generator's weights; 0 uses the last (Q11).",
        "bfloat16": "Autocast on a GPU; the CPU always computes in float32.",
        "log_every": "Steps between rows of log.jsonl.",
        "save_every": "Steps between checkpoints and sample grids.",
    },
)
@seed_option
@device_option
def train_gan(task, patches, run, init, preset, seed, device, **options):
    """Train the GAN that adds a mass, adds calcifications, or removes a lesion (section 2).

    For calcifications the presets but the paper's have a noise value a pixel, no growth and no
    spectral normalisation of the generator: --noise-cells 256 --iters-base 0 --iters-fade 0
    --no-sn-g, tiny also --d-base 16 --d-center 2048.

    Several GPUs: torchrun --nproc-per-node N -- mamgan.py train-gan ...
    """
    config = configure(train.gan_presets(task), preset, options, seed=seed)
    if not config.iters_fade + config.iters_final:
        text = "--iters-fade, --iters-final: both 0; the full-size layers would stay untrained"
        raise click.UsageError(text)
    train.train_gan(config, patches, run, runs.choose_device(device), init)


# --- §3 Synthetic dataset ---


@cli.command()
@option("--gan", FOLDER, "Run of train-gan.", required=True)
@option("--data patches", FOLDER, "Patch set of prepare, of the GAN's side and spacing.")
@option("--out", FOLDER, "Synthetic set, or folder of full images.", required=True)
@option("-n number", COUNT, "Samples to write (S10).  [5000]")
@option("--component", click.Choice(["largest", "cluster"]), COMPONENT, default="largest")
@option("--control", click.Choice(["blob"]), "A featureless bump in place of the lesion.")
@option("--min-area min_area_frac", SHARE, "Least share (S5).  [largest 0.10, cluster 0.02]")
@option("--max-area max_area_frac", SHARE, "Largest share; the paper sets none.  [1]")
@option("--expand dilate_px", LENGTH, "px at 256 px (S6).", default=DILATE_PX)
@option("--smoothing smooth_sigma", POSITIVE, "Sigma, px at 256 px (Q29).", default=SMOOTH_SIGMA)
@option("--image images", FOLDER, "Full mammogram or manifest. Repeat.", multiple=True)
@option("--at", int, "Patch centre, stored px. Repeat.", nargs=2, multiple=True, metavar="ROW COL")
@option("--lesions", COUNT, "Lesions at random places.", default=1)
@option("--strip", COUNT, "So many contiguous patches in a row (Figure 3).", default=1)
@seed_option
@device_option
def synthesize(gan, patches, out, number, control, images, at, lesions, strip, device, **options):
    """Trained GAN -> synthetic set (S1 to S10), or lesions in full mammograms (F3, F7).

    With --data a synthetic set, from a patch set that holds nothing of the GAN's training in
    validation or test; with --image full mammograms with boxes and masks. A removal GAN takes out
    the lesions whose boxes a manifest gives (else --at, or random places).
    """
    if bool(images) == bool(patches):
        raise click.UsageError("give --data for a synthetic set or --image for full mammograms")
    several = bool(at) + (lesions > 1) + (strip > 1)
    if patches and several:
        raise click.UsageError("--at, --lesions and --strip belong to --image")
    if images and (control or number):
        raise click.UsageError("--control and -n belong to --data")
    if several > 1:
        raise click.UsageError("--at, --lesions, --strip: give one of them")
    device = runs.choose_device(device)
    if patches:
        synthesize_set(
            gan, patches, out, n=number or 5000, control=control or "", device=device, **options
        )
        return
    failed = fullimage.synthesize_images(
        gan, images, out, at=at, lesions=lesions, strip=strip, device=device, **options
    )
    if failed:
        reasons = "".join(f"\n  {file}: {reason}" for file, reason in failed)
        raise click.ClickException(f"{len(failed)} of the images failed:{reasons}")


# --- §3 Patch Classifier Training ---


@cli.command("train-cls")
@option("--data patches", FOLDER, "Patch set of prepare.", required=True)
@option("--run", FOLDER, "Run folder to write.", required=True)
@option("--synthetic", FOLDER, "Synthetic set to mix in. Repeat.", multiple=True)
@option("--proportion", SHARE, "Initial synthetic share (C6).  [0.5 with --synthetic, else 0]")
@preset_options(
    train.CLASSIFIER_PRESETS,
    {
        "weights": "First weights: imagenet, none or a file (C1).",
        "samples": "Patches drawn, real and synthetic (C3).",
        "batch_size": "The paper names none (Q32).",
        "learning_rate": "C4",
        "decay": "Of the proportion (C5, Q33).",
        "decay_every": "Patches between decays (C5).",
        "evaluate_every": "Patches between looks at the validation set (C7).",
        "width": "Filters of the small network's first stage, 8 or more.",
        "augment": "classical: flips, turns, scale, contrast, brightness drawn for every patch.",
        "include_benign": "Benign patches as negatives (Q36).",
        "bfloat16": "Autocast on a GPU; the CPU always computes in float32.",
    },
)
@option("--seeds", COUNT, "Repeat the regime: RUN/seed-0 ...", default=1)
@seed_option
@device_option
def train_cls(patches, run, synthetic, proportion, preset, seeds, seed, device, **options):
    """Train the cancer / no-cancer classifier of one regime of Table 1 (C1 to C7)."""
    if proportion is None:
        proportion = 0.5 if synthetic else 0.0
    if (run / "config.json").exists() if seeds > 1 else any(run.glob("seed-*")):
        held = "one run" if seeds > 1 else "runs of several --seeds"
        raise click.UsageError(f"--run {run}: holds {held}, not to be mixed; give another folder")
    side = patchset.patch_config(patches)["patch_size"]
    if side != (usual := data.PREPARE_PRESETS[preset].patch_size):
        note = f"note: {side} px patches with the preset {preset}, which is for {usual} px"
        click.secho(note, fg="red", err=True)
    runs.say_once.cache_clear()  # once a command, that is
    for k in range(seeds):
        fixed = {"proportion": proportion, "seed": seed + k}
        config = configure(train.CLASSIFIER_PRESETS, preset, options, **fixed)
        if options["width"] and config.network == "resnet50":
            raise click.UsageError("--width belongs to the small network (presets tiny, cbis-cpu)")
        if config.width < 8:  # oneDNN's AVX2 kernels write past the end of 4 channels (torch 2.14)
            raise click.UsageError(f"--width {config.width}: expected 8 or more")
        folder = run / f"seed-{seed + k}" if seeds > 1 else run
        train.train_classifier(config, patches, folder, synthetic, runs.choose_device(device))


# --- §3 Results ---


def print_table(rows: list[dict], out: Path) -> None:
    """Table 1 on standard output, with the place of the report."""
    line = "{:<25}{:<24}{:<26}{:<10}{:<13}{}"
    names = "Training regime", "AUC (95% CI)", "difference", "p DeLong", "p clustered", "detectable"
    click.echo(line.format(*names))
    for row in rows:
        auc = report.in_words((row["auc"], row["low"], row["high"]))
        p = [report.p_in_words(row[key]) for key in ("p_delong", "p_clustered")]
        detectable = report.in_words((row["detectable"],))
        click.echo(line.format(row["regime"], auc, report.difference_in_words(row), *p, detectable))
    click.echo(f"Report: {out / 'report.html'}")


@cli.command()
@option("--data patches", FOLDER, "Patch set of prepare.")
@option("--baseline", FOLDER, "Run of train-cls on real patches only.")
@option("--augmented", FOLDER, "Run of another regime. Repeat.", multiple=True)
@option("--synthetic", FOLDER, "Set for the controls. Repeat.", multiple=True)
@option("--test", FOLDER, "Another patch set, whose test split is scored too (external test).")
@option("--folds", FOLDER, "Output of evaluate for a fold of prepare. Repeat.", multiple=True)
@option("--out", FOLDER, "Folder for table1.csv, report.html ...", required=True)
@seed_option
@device_option
def evaluate(patches, baseline, augmented, synthetic, test, folds, out, seed, device):
    """Table 1 with patient-clustered statistics, controls, figures and one report (E1 to E4).

    With --folds (repeated) the same tables over the folds of a cross-validation, from the output
    of this command for each: differences within a fold, averaged over folds. Detectable is the
    smallest true difference that a test like this finds with 80% power.
    """
    given = (patches, baseline, augmented, synthetic, test)
    if any(given) if folds else None in given[:2]:
        raise click.UsageError("give --data and --baseline, or --folds alone")
    one = (patches, baseline, augmented, synthetic, out, runs.choose_device(device), seed, test)
    print_table(report.evaluate_folds(folds, out) if folds else report.evaluate(*one), out)


# --- The whole chain on phantoms ---

# Shorter than the preset: three GANs and four classifiers in about eleven minutes.
DEMO_GAN = ("--iters-base", 200, "--iters-fade", 50, "--iters-final", 450)
DEMO_GAN += ("--d-base", 16, "--d-center", 2048)
DEMO_GRAINS = ("--iters-final", 1_000)
DEMO_CLASSIFIER = ("--samples", 10_000, "--decay-every", 100, "--evaluate-every", 1_000)
DEMO_SAMPLES = 300  # synthetic patches a set


@cli.command()
@option("--out", FOLDER, "Folder for everything.", required=True)
@seed_option
def demo(out, seed):
    """All of it on synthetic phantoms: about eleven minutes on two CPU cores.

    Runs the other commands one after the other and prints each; given again, it goes on.
    """

    def call(*arguments: object) -> None:
        line = [str(a) for a in arguments]
        click.secho(f"\n$ python mamgan.py {shlex.join(line)}", bold=True)
        cli.commands[line[0]].main(line[1:], standalone_mode=False)

    click.secho("Phantoms: synthetic mammograms as DICOM files", bold=True)
    manifest = phantom.write_phantoms(out / "phantoms", seed=seed)
    patches = out / "patches"
    common = ("--preset", "tiny", "--seed", seed)
    call("prepare", manifest, "--out", patches, "--qc", 12, *common)
    sets = {"": [], "blob": []}  # by control
    for task in data.TASKS:
        gan = out / f"gan-{task}"
        grains = task == "calcification"
        line = ["train-gan", "--task", task, "--data", patches, "--run", gan, *common]
        call(*line, *(DEMO_GRAINS if grains else DEMO_GAN))
        component = "cluster" if grains else "largest"
        for control, made in sets.items():
            folder = out / "-".join(["synthetic", task, *filter(None, [control])])
            line = ["synthesize", "--gan", gan, "--data", patches, "--out", folder]
            line += ["-n", DEMO_SAMPLES, "--component", component, "--seed", seed]
            try:
                call(*line, *(["--control", control] if control else []))
                made += ["--synthetic", folder]
            except NothingAccepted as error:  # the others are mixed in without it
                click.secho(str(error), fg="red", err=True)
    train_cls = ("train-cls", "--data", patches, *common, *DEMO_CLASSIFIER, "--run")
    call(*train_cls, out / "cls-baseline")
    regimes = {"cls-50": (0.5, ""), "cls-100": (1.0, ""), "cls-blob-50": (0.5, "blob")}
    for name, (proportion, control) in regimes.items():
        call(*train_cls, out / name, "--proportion", proportion, *sets[control])
    augmented = [part for name in regimes for part in ("--augmented", out / name)]
    line = ("evaluate", "--data", patches, "--baseline", out / "cls-baseline", *augmented)
    call(*line, *sets[""], *sets["blob"], "--out", out / "report", "--seed", seed)


if __name__ == "__main__":
    cli()
