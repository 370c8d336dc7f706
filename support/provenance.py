"""What decides a run, for its config.json, and whether the parts it is made of fit together."""

from dataclasses import asdict
from pathlib import Path

import click

from data import TASKS
from support import patchset, runs
from support.files import sha256
from support.patchset import Patches, SyntheticSet
from support.sources import SPLITS

NETWORKS = ("patch_size", "g_base", "g_center", "d_base", "d_center", "noise_cells", "sn_g", "sn_d")
GRAINS_MM = 0.15  # a pixel, at most: calcifications of interest are 0.1 to 0.5 mm wide


def gan_facts(config, data: Path, init: Path | None = None) -> dict:
    """Facts of a GAN run. images, patients: the uids and ids of all that its networks have seen.

    Raises ValueError when data or the run to start from do not fit.
    """
    patches = patchset.patch_config(data)
    if (held := patches["patch_size"]) != config.patch_size:
        found = f"{data}: holds patches of {held} px, the preset trains on {config.patch_size} px"
        raise ValueError(f"{found}; give the preset that prepared them")
    facts = asdict(config) | {"data": patches["fingerprint"], "spacing_mm": patches["spacing_mm"]}
    # Full mammograms must be read, and a pixel of them become as large, as those of the patches.
    facts |= {"bits": patches["bits"]} if patches.get("bits") else {}
    facts |= {key: patches[key] for key in ("source", "format") if key in patches}
    images, patients, task = set(), set(), TASKS[config.task]
    for name in task:
        pool = Patches.open(data, "train", name)
        least = config.batch_size * (2 if name == task.source else 1)
        if len(pool) < least:
            raise ValueError(
                f"{data}: train/{name} holds {len(pool)} patches; expected at least {least} "
                f"for --batch-size {config.batch_size}; prepare more or lower it"
            )
        images |= set(pool.column("image_uid").tolist())
        patients |= set(pool.column("patient_id").tolist())
    if init:
        start = runs.finished(init, "train-gan")
        for name in NETWORKS:
            if start["config"].get(name) != facts[name]:
                raise ValueError(
                    f"--init {init}: found networks with {name} {start['config'].get(name)}; "
                    f"expected {facts[name]}; give its preset and options"
                )
        check_unseen(start["config"], data, f"--init {init}:")
        images |= set(start["config"]["images"])
        patients |= set(start["config"]["patients"])
        facts["init"] = {"generator": start["generator"], "task": start["config"]["task"]}
        click.echo(f"starts from the networks of {init}", err=True)
    if config.task == "calcification":
        say_spacing(patches["spacing_mm"])
    return facts | {"images": sorted(images), "patients": sorted(patients)}


def say_spacing(spacing_mm: float | None) -> None:
    """Whether a pixel is small enough for calcifications."""
    found = f"{spacing_mm:g} mm" if spacing_mm else "native pixels"
    need = f"calcifications of 0.1 to 0.5 mm need pixels of {GRAINS_MM} mm or less (native ones)"
    if spacing_mm and spacing_mm > GRAINS_MM:
        text = f"WARNING: {need}; these patches have {found}: most grains are a pixel or none"
        click.secho(text, fg="red", err=True)
    else:
        click.echo(f"{need}; these patches have {found}", err=True)


def usable_sets(config, data: Path, paths: list[Path]) -> list[SyntheticSet]:
    """The synthetic sets to mix in. Raises ValueError when they do not fit data or proportion."""
    sets = [patchset.open_synthetic(path) for path in paths]
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


# --- Nothing that a generator or classifier has seen may test it ---


def check_external(other: Path, data: Path) -> dict:
    """Configuration of a patch set whose test split is to test models trained on `data`.

    Raises ValueError: another side (px) or spacing (mm), or a test image (by the hash of its
    pixels) that gave patches in any split of `data`. A patient's id in both is an error too when
    both are of one source: the same rows, or one public data set (prepare --format). Else it may be
    another patient, as two hospitals number theirs alike; pseudonyms of two keys never agree.
    """
    ours, theirs = patchset.patch_config(data), patchset.patch_config(other)
    for key in ("patch_size", "spacing_mm"):
        if ours[key] != theirs[key]:
            text = f"{key} {theirs[key]}; prepare it with {ours[key]}, as {data}"
            raise ValueError(f"--test {other}: {text}")
    names = (("image_uid", "images"), ("patient_id", "patients"))
    for name, what in names[: 1 + one_source(ours, theirs)]:
        known = {v for split in SPLITS for v in Patches.open(data, split).column(name).tolist()}
        if both := sorted(known & set(Patches.open(other, "test").column(name).tolist())):
            text = f"{len(both)} {what} of its test split, such as {both[0]}, are in {data} too"
            raise ValueError(f"--test {other}: {text}; give patients that the models never saw")
    return theirs


def check_generators(other: Path, regimes: list, sets: list[SyntheticSet]) -> None:
    """Raises ValueError unless the generators behind each regime's sets never saw the test split of
    `other`; what a generator saw stands in its sets alone, so all of them must be at hand."""
    given = {s.fingerprint for s in sets}
    for regime in regimes:
        if absent := [s for s in regime.config["synthetic"] if s["fingerprint"] not in given]:
            text = f"{regime.name} was trained with a {absent[0]['task']} set that is not given"
            advice = "give each of its sets with --synthetic, to tell what their generators saw"
            raise ValueError(f"--test {other}: {text}; {advice}")
    for syn in sets:
        check_unseen(syn.gan, other, f"{syn.path}: its generator", ("test",))


def check_synthetic(syn: SyntheticSet, data: Path) -> None:
    """Raises ValueError unless every sample comes from a training patient of this patch set.

    Sets carry the hash of the patch set and of each source image: both are compared, not trusted.
    """
    again, train = f"synthesize it again from {data}", Patches.open(data, "train")
    if syn.data_fingerprint != patchset.fingerprint(data):
        raise ValueError(f"{syn.path}: made from another patch set; {again}")
    names = ("image_uid", "patient_id")
    known = set(zip(*map(train.column, names), strict=True))
    if foreign := set(zip(*(syn.index[name] for name in names), strict=True)) - known:
        image, patient = min(foreign)
        split = patchset.split_of(data).get(patient, "unknown")
        text = f"{len(foreign)} source images are not in train, such as {image} of {patient}"
        raise ValueError(f"{syn.path}: {text} ({split}); {again}")
    check_unseen(syn.gan, data, f"{syn.path}: its generator")


def one_source(a: dict, b: dict) -> bool:
    """Whether two patch sets are of the same rows or public data set: an id means one patient."""
    return any(a.get(k) == b.get(k) not in (None, "manifest") for k in ("source", "format"))


def check_unseen(gan: dict, data: Path, what: str, splits=SPLITS[1:]) -> None:
    """Raises ValueError when a generator was trained on images that validate or test here, told by
    their pixels, or on such patients where both are of one source.

    gan: its run's configuration. A reduced copy of an archive has other pixels: hence the ids.
    """
    config = patchset.patch_config(data)
    if gan.get("data") == config["fingerprint"] and "init" not in gan:
        return  # trained on these training patches alone
    if not gan.keys() >= {"images", "patients"}:
        raise ValueError(f"{what} does not say which images it was trained on; train it again")
    seen = {"image_uid": set(gan["images"]), "patient_id": set(gan["patients"])}
    held_splits = {key.partition("/")[0] for key in config["held"]}
    for name in ("image_uid", "patient_id")[: 1 + one_source(config, gan)]:
        for split in sorted(held_splits.intersection(splits)):
            held = set(Patches.open(data, split).column(name).tolist())
            if both := sorted(held & seen[name]):
                found = f"was trained on {len(both)} of split {split}, such as {name} {both[0]}"
                raise ValueError(f"{what} {found}; give patches that it never saw there")
