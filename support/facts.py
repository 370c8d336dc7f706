"""What decides a run, for its config.json, and whether the parts it is made of fit together."""

from dataclasses import asdict
from pathlib import Path

import click

from data import TASKS
from support import patchset, runs
from support.files import sha256
from support.patchset import Patches, SyntheticSet

NETWORKS = ("patch_size", "g_base", "g_center", "d_base", "d_center", "noise_cells", "sn_g", "sn_d")
GRAINS_MM = 0.15  # a pixel: the smallest calcifications of interest are 0.1 to 0.5 mm wide


def gan_facts(config, data: Path, init: Path | None = None) -> dict:
    """Facts of a GAN run. images: the uids of all images that its networks have seen.

    Raises ValueError when data or the run to start from do not fit.
    """
    patches = patchset.patch_config(data)
    if (held := patches["patch_size"]) != config.patch_size:
        found = f"{data}: holds patches of {held} px, the preset trains on {config.patch_size} px"
        raise ValueError(f"{found}; give the preset that prepared them")
    facts = asdict(config) | {"data": patches["fingerprint"], "spacing_mm": patches["spacing_mm"]}
    # Full mammograms must be read, and a pixel of them become as large, as those of the patches.
    facts |= {"bits": patches["bits"]} if patches.get("bits") else {}
    images, task = set(), TASKS[config.task]
    for name in task:
        pool = Patches.open(data, "train", name)
        least = config.batch_size * (2 if name == task.source else 1)
        if len(pool) < least:
            raise ValueError(
                f"{data}: train/{name} holds {len(pool)} patches; expected at least {least} "
                f"for --batch-size {config.batch_size}; prepare more or lower it"
            )
        images |= set(pool.column("image_uid").tolist())
    if init:
        start = runs.finished(init, "train-gan")
        for name in NETWORKS:
            if start["config"].get(name) != facts[name]:
                raise ValueError(
                    f"--init {init}: found networks with {name} {start['config'].get(name)}; "
                    f"expected {facts[name]}; give its preset and options"
                )
        images |= set(start["config"]["images"])
        facts["init"] = {"generator": start["generator"], "task": start["config"]["task"]}
        click.echo(f"starts from the networks of {init}", err=True)
    if config.task == "calcification":
        say_spacing(patches["spacing_mm"])
    return facts | {"images": sorted(images)}


def say_spacing(spacing_mm: float | None) -> None:
    """Whether a pixel is small enough for calcifications."""
    found = f"{spacing_mm:g} mm" if spacing_mm else "native pixels"
    need = "calcifications of 0.1 to 0.5 mm need pixels of 0.1 mm or less (the paper's native ones)"
    if spacing_mm and spacing_mm > GRAINS_MM:
        text = f"WARNING: {need}; these patches have {found}: most grains are a pixel or none"
        click.secho(text, fg="red", err=True)
    else:
        click.echo(f"{need}; these patches have {found}", err=True)


def usable_sets(config, data: Path, paths: list[Path]) -> list[SyntheticSet]:
    """The synthetic sets to mix in. Raises ValueError when they do not fit data or proportion."""
    sets = [patchset.open_synthetic(path) for path in paths]
    for s in sets:
        patchset.check_synthetic(s, data)
    if len({s.control for s in sets}) > 1:
        found = ", ".join(f"{s.path} ({s.control or 'GAN'})" for s in sets)
        raise ValueError(f"--synthetic: found {found}; expected sets of GANs or of a control alone")
    if bool(config.proportion) != any(s.label for s in sets):
        raise ValueError(
            f"--proportion {config.proportion}: found {len(sets)} --synthetic sets; expected a "
            "proportion above 0 together with a mass or calcification set, or neither"
        )
    if sets and all(s.label for s in sets):
        runs.say_once("no removal set: synthetic patches replace positives only")
    return sets


def classifier_facts(config, data: Path, sets: list[SyntheticSet]) -> dict:
    """Facts of a classifier run."""
    facts = asdict(config) | {"data": patchset.patch_config(data)["fingerprint"]}
    facts["synthetic"] = [
        {"task": s.task, "control": s.control, "short": s.short, "samples": len(s.combined)}
        | {"generator": s.generator, "fingerprint": s.fingerprint}
        for s in sets
    ]
    if config.weights not in ("imagenet", "none"):
        facts["weights"] = f"file {sha256(Path(config.weights))[:16]}"
    return facts
