"""Patch sets and synthetic sets on disk: written in many processes, read, checked for leaks."""

import concurrent.futures
import contextlib
import functools
import hmac
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import data
from data import CLASSES, KEYS, DecodedImage, PrepareConfig, SourceImage
from support import folds, runs, sources
from support.figures import save_figure
from support.files import open_array, read_json, read_table, reading, sha256, write_table
from support.runs import claim_folder, finish_folder, finished, numpy_rng, progress, signals_held
from support.sources import BOX, PATHOLOGIES, SPLITS, Finding

BBOX = tuple(f"bbox_{name}" for name in BOX)
INDEX_COLUMNS = (
    *("patch", "image_uid", "patient_id", *BOX),
    *("scale", "flip", "rotation", "seed", "tissue", *BBOX),
)
SYNTHETIC_COLUMNS = ("sample", "source_patch", "image_uid", "patient_id", "seed", "area", *BBOX)
IN_AIR = "Boxes in air gave no lesion patches, and their images no normal ones; correct the source"
UNMASKED = "Masks that cannot be used, the boxes in their place; correct the source"
MIRRORS = (
    "rows and columns swapped",
    "rows counted from the bottom",
    "columns counted from the right",
)
FEW_PATIENTS = 5  # fewer are a remark: a class is judged by its patients, not by its patches
PSEUDONYM_KEY = "MAMGAN_PSEUDONYM_KEY"  # environment variable
Request = tuple[str, int, int]  # "split/class", patch, attempt


# --- Patch sets: writing ---


def prepare(
    findings: list[Finding],
    out: Path,
    config: PrepareConfig,
    workers: int = 1,
    qc: int = 0,
    notes: Sequence[str] = (),
    source_format: str = "manifest",
) -> None:
    """Findings -> patch set in `out`; goes on where it was interrupted.

    Raises ValueError: contradictory findings, a class that was asked for and is not there, the same
    image with two patients, no space; OSError: files that cannot be written.
    """
    sources.raise_all("the source: found", sources.check_findings(findings), "correct it")
    if config.spacing_mm and not 1e-3 < config.spacing_mm < 10:
        raise ValueError(f"--spacing-mm {config.spacing_mm}: expected 0.001 to 10, or 0 (native)")
    writer = PatchWriter(findings, out, config)
    base = os.path.commonpath([os.path.dirname(row.image_path) for row in findings])
    rows = [(os.path.relpath(row.image_path, base), row) for im in writer.images for row in im.rows]
    blank = {"image_path": "", "mask_path": ""} | ({"split": ""} if config.fold else {})
    rows = [(name, replace(row, **blank)) for name, row in rows]  # the same source in every fold
    settings = {"source": sha256(repr(rows).encode()), "key": writer.hide("key")}
    with claim_folder(out, "prepare", asdict(config) | settings) as complete:
        if not complete:
            writer.reserve()
            writer.cut(workers)
            writer.finish(notes, source_format)
        shutil.rmtree(out / "work", ignore_errors=True)
        if qc:
            contact_sheet(writer.images, config, out, qc)


def _pseudonyms(wanted: bool) -> Callable[[str], str]:
    """Keyed hash of a patient id or path (HMAC-SHA256); without `wanted`, the text itself.

    The key comes from the environment and is kept nowhere: whoever holds it can link patients to
    pseudonyms, the outputs alone cannot, and the same key goes on with the same folder.
    """
    if not wanted:
        return str
    key = os.environ.get(PSEUDONYM_KEY, "").encode()
    if len(key) < 16:
        text = f"environment variable {PSEUDONYM_KEY} has {len(key)} characters; expected a secret"
        advice = f"export {PSEUDONYM_KEY}=$(openssl rand -hex 32)"
        raise ValueError(f"--pseudonymise: {text} of 16 or more; {advice}")
    return lambda text: hmac.new(key, text.encode(), "sha256").hexdigest()[:16]


def visit_image(
    index: int, image: SourceImage, config: PrepareConfig, out: Path, requests: list[Request]
) -> dict:
    """Decode an image, cut and store what is requested of it; runs in a worker process.

    The result is a line of the journal. Its "rows" are the patches that found a place: key, patch,
    columns of the index; they are on disk.
    """
    visit = {"image": index, "uid": "", "reason": "", "dark": None, "unlimited": False}
    visit |= {"no_place": [], "in_air": "", "unmasked": "", "rows": []}
    try:
        decoded = DecodedImage(image, config)
    except (ValueError, OSError) as error:  # an OSError would name the file
        reason, dark = getattr(error, "strerror", None) or str(error), getattr(error, "dark", None)
        if dark:
            found = f"no breast found: it uses {_depth(*dark)}"
            reason = f"{found}, give --bits {dark[0]} and a new --out"
        return visit | {"reason": " ".join(reason.split()), "dark": dark}
    visit |= {"uid": decoded.uid, "in_air": _in_air(decoded), "dark": decoded.dark}
    visit |= {"unlimited": decoded.unlimited, "unmasked": "; ".join(decoded.unmasked)}
    arrays = {}
    for key in sorted({key for key, _, _ in requests}):
        # Whether a class has any place here may not depend on which patches ask first.
        if decoded.place(key, numpy_rng(config.seed, index, KEYS.index(key))):
            arrays[key] = np.load(out / "patches" / f"{key}.npy", mmap_mode="r+")
        else:
            visit["no_place"].append(key)
    for key, patch, attempt in requests:
        seed = data.patch_seed(config.seed, key, patch, attempt)
        if key in arrays and (place := decoded.place(key, np.random.default_rng(seed))):
            arrays[key][patch], bbox = decoded.cut(place)
            row = (*place.window, f"{place.scale:.6f}", place.flip, place.rotation)
            row += (seed, f"{place.tissue:.4f}", *(bbox or ("",) * 4))
            visit["rows"].append((key, patch, ",".join(map(str, row))))
    for array in arrays.values():
        array.flush()
    return visit


def _in_air(decoded: DecodedImage) -> str:
    """A box in air, and the simplest mirror or swap of axes that puts it on tissue; "" for none."""
    if not decoded.in_air:
        return ""
    box, (h, w) = min(row.bbox for row in decoded.in_air), decoded.display.shape
    shares = {}
    for mirror in itertools.product((False, True), repeat=3):
        a, b, c, d = (box[1], box[0], box[3], box[2]) if mirror[0] else box
        a, c = (h - c, h - a) if mirror[1] else (a, c)
        b, d = (w - d, w - b) if mirror[2] else (b, d)
        shares[mirror] = decoded.on_tissue((a, b, c, d))
    fitting = [mirror for mirror in sorted(shares, key=sum) if shares[mirror] > 0.75]
    best = fitting[0] if fitting else max(shares, key=shares.get)
    words = " and ".join(itertools.compress(MIRRORS, best))
    fit = f"on tissue with {words}" if shares[best] > 0.5 else "no mirror or swap fits"
    return f"box {', '.join(f'{n:g}' for n in box)} in air, {fit}"


def _depth(used: int, depth: int) -> str:
    return f"1/{2 ** (depth - used)} of its bit depth ({used} of {depth} bits)"


class PatchWriter:
    """`prepare` at work.

    A patch is requested of the image of its first attempt; where that has no place for it, of that
    of its next. Each image is visited once for all patches requested of it; only requests passed on
    to an image that was visited already cause a second visit. `work/visits.jsonl`, the journal, has
    a line per visit: what it holds is done and on disk, whenever the run is killed.
    """

    def __init__(self, findings: list[Finding], out: Path, config: PrepareConfig):
        self.out, self.config, self.hide = out, config, _pseudonyms(config.pseudonymise)
        images = data.source_images(folds.deal_folds(findings, config), config, self.hide)
        self.images = folds.keep_share(images, config.malignant_share, config.seed)
        self.images_of = {  # "split/class": images it is drawn from
            key: [index for index, image in enumerate(self.images) if key in image.classes]
            for key in KEYS
            if config.counts.get(key)
        }
        self.skipped: dict[str, str] = {}
        self.rows = {key: [None] * config.counts[key] for key in self.images_of}  # image, columns
        self.visits: dict[int, dict] = {}  # the last one of each image
        self.requests = defaultdict(list)  # image: what is requested of it
        self.no_place = {key: set() for key in self.images_of}  # images without a place for a class
        self.names = defaultdict(set)  # image_uid: images
        for key in [key for key, indexes in self.images_of.items() if not indexes]:
            name = key.partition("/")[2]
            elsewhere = any(f"{image.split}/{name}" in image.classes for image in self.images)
            hint = ", see --normals (annotated)" if name == "normal" else ""
            none = f"the source holds none{hint}"
            self.skip(key, "none of its patients is in this split" if elsewhere else none)
        if not self.images_of:
            text = f"found no wanted class in {len(self.images)} images; expected normal images, or"
            advice = "see --normals and --birads-as-pathology"
            raise ValueError(f"the source: {text} boxes with a pathology; {advice}")
        self.splits = {image.patient_id: image.split for image in self.images if image.split}
        self.patients = {split: list(self.splits.values()).count(split) for split in SPLITS}
        text = ", ".join(f"{split} {number}" for split, number in self.patients.items())
        click.echo(f"patients: {text}", err=True)

    def path(self, key: str) -> Path:
        return self.out / "patches" / f"{key}.npy"

    def skip(self, key: str, why: str, example: str = "") -> None:
        """Do without a class. Raises ValueError when it was asked for."""
        text = f"{key}: {why}; {self.config.counts[key]} patches wanted"
        if key in self.config.required:
            raise ValueError(f"--count {text}{example}")
        self.skipped[key] = why
        del self.images_of[key], self.rows[key]
        click.echo(f"{text}: skipped", err=True)

    def reserve(self) -> None:
        """Arrays for every patch, their whole size reserved. Raises ValueError without the room."""
        size = self.config.patch_size
        needed = (2 * size**2 + 500) * sum(map(len, self.rows.values()))  # 500: index and journal
        if (self.out / "work").exists():
            return
        if needed > (free := shutil.disk_usage(self.out).free):
            text = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise ValueError(f"{self.out}: {text}; make room or lower --count")
        for key, rows in self.rows.items():
            self.path(key).parent.mkdir(parents=True, exist_ok=True)
            _reserve(self.path(key), (len(rows), size, size))
        (self.out / "work").mkdir()  # last: with it, the arrays are whole

    def assign(self, key: str, patch: int, attempt: int) -> None:
        """Request a patch of the image of its first attempt, from `attempt` on, that may do."""
        while key in self.images_of:
            bits = data.patch_seed(self.config.seed, key, patch, attempt)
            image = data.random_image(self.images_of[key], bits)
            if image not in self.no_place[key]:
                self.requests[image].append((key, patch, attempt))
                return
            attempt += 1

    def record(self, visit: dict) -> None:
        """Take in a visit, this run's or an earlier one's.

        Raises ValueError: an image of two patients, or normal tissue of an image with a lesion.
        """
        index, image = visit["image"], self.images[visit["image"]]
        self.visits[index] = visit
        for key, patch, columns in visit.pop("rows"):
            self.rows[key][patch] = index, columns
        without = image.classes if visit["reason"] else visit["no_place"]
        for key in sorted(self.images_of.keys() & without):
            self.no_place[key].add(index)
            if len(self.no_place[key]) == len(self.images_of[key]):
                example = f"; {image.name}: {self.reason(index)}"
                self.skip(key, "no image has a place for it", example)
        self.names[visit["uid"] or index].add(index)
        same = [self.images[i] for i in sorted(self.names[visit["uid"] or index])]
        text = f"{' and '.join(image.name for image in same)} are the same image, and yet"
        if len(patients := {image.patient_id for image in same}) > 1:
            patients = " and ".join(sorted(patients))
            raise ValueError(f"{text} of patients {patients}; correct the source")
        marks = {tuple((r.finding, r.pathology, r.bbox) for r in image.rows) for image in same}
        if len(marks) > 1 and any("/normal" in key for image in same for key in image.classes):
            raise ValueError(f"{text} with other findings; list these under one of the names")

    def cut(self, workers: int) -> None:
        """Cut every patch that no earlier run has cut."""
        journal = self.out / "work" / "visits.jsonl"
        for visit in _read_journal(journal):
            self.record(visit)
        for key, rows in self.rows.items():
            for patch in [patch for patch, row in enumerate(rows) if row is None]:
                self.assign(key, patch, 0)
        total, left = (sum(map(len, d.values())) for d in (self.rows, self.requests))
        wanted = {index for indexes in self.images_of.values() for index in indexes}
        unseen, running = deque(sorted(wanted - self.visits.keys())), {}
        with (
            open(journal, "a", encoding="utf-8") as lines,
            progress(total, "patches", done=total - left) as advance,
            _processes(workers) as pool,
        ):
            while unseen or running or self.requests:
                while (unseen or self.requests) and len(running) < 2 * workers:
                    index = unseen.popleft() if unseen else next(iter(self.requests))
                    requests = self.requests.pop(index, [])
                    work = index, self.images[index], self.config, self.out, requests
                    running[pool.submit(visit_image, *work)] = index, requests
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED")[0]:
                    try:
                        visit = future.result()
                    except concurrent.futures.process.BrokenProcessPool:
                        names = ", ".join(self.images[index].name for index, _ in running.values())
                        text = f"a worker process died at one of {names}; leave the damaged one out"
                        raise ValueError(f"{text}, or give fewer --workers, make room") from None
                    lines.write(json.dumps(visit) + "\n")
                    lines.flush()
                    advance(len(visit["rows"]))
                    self.record(visit)
                    for key, patch, attempt in running.pop(future)[1]:
                        if key in self.rows and self.rows[key][patch] is None:
                            self.assign(key, patch, attempt + 1)

    def reason(self, index: int) -> str:
        """Why an image gave no patch."""
        image, visit = self.images[index], self.visits.get(index)
        if visit is None:
            if not image.split:
                return "a patient with cancer left out by --malignant-share"
            boxless = [row for row in image.rows if not row.bbox]
            if any(row.finding or row.pathology in PATHOLOGIES[2:] for row in boxless):
                return "a finding without a box: nobody knows where its lesion lies"
            if not any(row.pathology for row in image.rows):
                return "its pathology is unknown: neither a lesion patch nor a normal one"
            if image.rows[0].pathology == "normal" and not image.classes:
                return "normal, of a woman with findings: see --normals"
            return f"none of its findings is a class wanted in {image.split}"
        if visit["in_air"]:
            return visit["in_air"]
        for key in sorted(self.no_place):
            if index in self.no_place[key] and not visit["reason"]:
                return f"no window with enough tissue for {key}"
        return visit["reason"] or "usable; no patch happened to be drawn from it"

    @functools.cached_property
    def worst(self) -> dict[str, str]:
        """Of all that a patient's images show, used or not: malignant, else "" where something is
        unknown, else benign, or normal."""
        found = defaultdict(set)
        for image in self.images:
            found[image.patient_id] |= {row.pathology for row in image.rows}
        order = ("malignant", "", "benign", "normal")
        return {who: next(p for p in order if p in seen) for who, seen in found.items()}

    def remarks(self) -> tuple[list[str], dict[str, int]]:
        """What to know of boxes and patients, which it prints; normal patches of ill women."""
        remarks, cancer = [], {}
        for field, meaning in {"in_air": IN_AIR, "unmasked": UNMASKED}.items():
            found = [index for index in sorted(self.visits) if self.visits[index][field]]
            texts = [f"{self.images[i].name}: {self.visits[i][field]}" for i in found[:10]]
            texts += [f"and {len(found) - 10} more"] if len(found) > 10 else []
            remarks += [f"{meaning}: {'; '.join(texts)}."] if texts else []
        if unlimited := sum(visit["unlimited"] for visit in self.visits.values()):
            text = f"--bits {self.config.bits}: without effect on {unlimited} of {len(self.visits)}"
            remarks.append(f"{text} images, which have a window, a LUT or fewer bits.")
        dark = [tuple(visit["dark"]) for visit in self.visits.values() if visit["dark"]]
        for used in sorted(set(dark)):
            text = f"{dark.count(used)} of {len(self.visits)} images: each uses {_depth(*used)}"
            remarks.append(f"{text}, too dark or too bright; try --bits {max(dark)[0]}")
        for key, rows in self.rows.items():
            patients = [self.images[index].patient_id for index, _ in rows]
            number, split = len(set(patients)), key.removesuffix("/normal")
            text = f"{key}: {len(rows)} patches of {number} patient{'s' if number > 1 else ''}"
            if number < FEW_PATIENTS:
                little = f"below {FEW_PATIENTS}, what is measured on them says little."
                remarks.append(f"{text}; {little}")
            if split != key:
                cancer[split] = sum(self.worst[patient] == "malignant" for patient in patients)
                text += f", {cancer[split]} of the patches from women with cancer"
            click.echo(text, err=True)
        for key, why in self.skipped.items():
            if key.endswith("/normal"):
                remarks.append(f"{key}: none, which training and tests need ({why}).")
        for remark in remarks:
            click.echo(remark, err=True)
        return remarks, cancer

    def finish(self, notes: Sequence[str], source_format: str) -> None:
        """Write the tables, then mark the patch set whole."""
        images, out = self.images, self.out
        for key in self.skipped:
            self.path(key).unlink(missing_ok=True)
        for key, cut in self.rows.items():
            rows = (
                (patch, self.visits[index]["uid"], images[index].patient_id, *columns.split(","))
                for patch, (index, columns) in enumerate(cut)
            )
            write_table(self.path(key).with_suffix(".csv"), INDEX_COLUMNS, rows)
        used = {index for rows in self.rows.values() for index, _ in rows}
        excluded = [(im.name, self.reason(i)) for i, im in enumerate(images) if i not in used]
        write_table(out / "excluded.csv", ("image_path", "reason"), excluded)
        write_table(out / "splits.csv", ("patient_id", "split"), sorted(self.splits.items()))
        findings, told = [], {"image_uid": [], "patient_pathology": []}
        for index in sorted(used):
            image = images[index]
            names = {"image_path": image.name, "patient_id": image.patient_id, "split": image.split}
            for row in image.rows:
                mask = row.mask_path and self.hide(row.mask_path)
                findings.append(replace(row, **names, mask_path=mask))
                told["image_uid"].append(self.visits[index]["uid"])
                told["patient_pathology"].append(self.worst[image.patient_id])
        sources.write_manifest(out / "manifest.csv", findings, **told)
        text = f"{len(used)} of {len(images)} images gave patches"
        click.echo(f"{text}{'; the others: excluded.csv' if excluded else ''}", err=True)
        if not used:
            text = f"no patch could be cut; excluded.csv says why for each image: {excluded[0][1]}"
            raise ValueError(f"{out}: {text}; give other options and a new --out")
        same = sorted(sorted(indexes) for indexes in self.names.values() if len(indexes) > 1)
        duplicates = [[images[index].name for index in indexes] for indexes in same]
        for names in duplicates:
            click.echo(f"the same image under {len(names)} names: {', '.join(names)}", err=True)
        remarks, cancer = self.remarks()
        facts = {"counts": {key: len(rows) for key, rows in self.rows.items()}}
        facts |= {"images": {"used": len(used), "excluded": len(excluded)}}
        facts |= {"skipped": self.skipped, "patients": self.patients, "duplicates": duplicates}
        facts |= {"normals_with_cancer": cancer, "format": source_format}
        finish_folder(out, notes=[*notes, *remarks], **facts)


def _reserve(path: Path, shape: tuple[int, int, int]) -> None:
    """An array on disk, its whole size reserved, by zeros where the system or the file system has
    no other way (macOS, FUSE): a full disk must show here, not when a page is written."""
    try:
        start, size = 128, np.lib.format.open_memmap(path, "w+", "<u2", shape).nbytes + 128
        with open(path, "r+b") as file:
            with contextlib.suppress(AttributeError, OSError):
                os.posix_fallocate(file.fileno(), 0, size)
                start = size
            file.seek(start)
            for at in range(start, size, 2**20):
                file.write(bytes(min(2**20, size - at)))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _read_journal(path: Path) -> list[dict]:
    """The visits of earlier runs; a last line that a kill cut off is taken away."""
    if not path.exists():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with reading(path, "delete the folder and prepare again"):
        return [json.loads(line) for line in path.read_bytes().splitlines()]


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[concurrent.futures.Executor]:
    """Worker processes that end at once when the block is left by an exception."""
    spawned = multiprocessing.get_start_method() == "spawn"  # macOS: to fork is not safe there
    context = multiprocessing.get_context("spawn" if spawned else "fork")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        with signals_held() as stopping:  # Python drops a KeyboardInterrupt that comes in a fork
            pool.submit(os.getpid).result()  # starts all workers, or the first
        if stopping():
            raise KeyboardInterrupt
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Runs first in each worker."""
    for lock in runs.LOCKS:  # the folder is the parent's
        os.close(lock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def contact_sheet(images: list[SourceImage], config: PrepareConfig, out: Path, number: int) -> None:
    """`out/qc.png`: images with mask outline, lesion boxes and patch windows drawn in."""
    colours = dict(zip(CLASSES, ("cyan", "red", "orange", "magenta", "yellow"), strict=True))
    used = set(read_table(out / "manifest.csv", ("image_path",))["image_path"].tolist())
    images = [image for image in images if image.name in used]
    images = [images[i] for i in np.unique(np.linspace(0, len(images) - 1, number).astype(int))]
    windows = defaultdict(list)
    for key in read_json(out / "config.json")["counts"]:
        table = read_table(out / "patches" / f"{key}.csv", ("image_uid", *BOX))
        for uid, *window in zip(*table.values(), strict=True):
            windows[uid].append((colours[key.split("/")[1]], 0.7, map(float, window)))
    down, across = -(-len(images) // 4), min(4, len(images))
    figure = Figure((4 * across, 4.6 * down), layout="constrained")
    for place, image in enumerate(images, start=1):
        decoded, first = DecodedImage(image, config), image.rows[0]
        cut = windows[decoded.uid]
        shown = cut[:12]
        for row in image.rows:
            colour = colours.get(f"{row.pathology}_{row.finding}", "white")
            shown += [(colour, 2, row.bbox)] if row.bbox else []
        axes = figure.add_subplot(down, across, place, xticks=[], yticks=[])
        axes.imshow(decoded.display, cmap="gray", aspect=decoded.side[1] / decoded.side[0])
        cells, f = data.breast_cells(decoded.display)
        rows, cols = (f * (np.arange(n) + 0.5) for n in cells.shape)
        axes.contour(cols, rows, cells, levels=[0.5], colors="lime", linewidths=0.8)
        for colour, line, (row0, col0, row1, col1) in shown:
            corners = [col0, col1, col1, col0, col0], [row0, row0, row1, row1, row0]
            axes.plot(*corners, color=colour, linewidth=line)
        title = f"{image.split} {first.laterality} {first.view}: {len(cut)} patches"
        axes.set_title(f"{image.name[-48:]}\n{title}", fontsize=7)
    legend = {"breast mask": "lime", **colours, "other findings": "white"}
    lines = [Line2D([], [], color=colour, label=name) for name, colour in legend.items()]
    text = "thick: boxes of lesions; thin: first patches"
    style = {"title": text, "fontsize": 7, "facecolor": "lightgrey", "ncols": 1 + across}
    figure.legend(handles=lines, loc="outside upper center", **style)
    save_figure(figure, out / "qc.png")


# --- Patch sets: reading ---


def patch_config(data: Path) -> dict:
    """The configuration of a finished patch set, with its fingerprint. Raises ValueError."""
    facts = finished(Path(data), "prepare")
    with reading(Path(data) / "config.json", "run prepare again"):
        config, held = facts["config"], facts["counts"]
        if not held.keys() <= set(KEYS):
            raise ValueError("counts")
    # BI-RADS as pathology, say; the other breast of women with cancer
    told = {k: facts[k] for k in ("notes", "normals_with_cancer", "format") if facts.get(k)}
    return config | {"held": held, "fingerprint": fingerprint(data)} | told


def fingerprint(data: Path) -> str:
    """Names a patch set in everything made from it: a hash over options, splits and indexes."""
    data = Path(data)
    config = json.dumps(read_json(data / "config.json").get("config"), sort_keys=True)
    return sha256(config.encode(), data / "splits.csv", *sorted(data.glob("patches/*/*.csv")))


def split_of(data: Path) -> dict[str, str]:
    """Patient -> split."""
    table = read_table(Path(data) / "splits.csv", ("patient_id", "split"))
    return dict(zip(*(column.tolist() for column in table.values()), strict=True))


def flow(data: Path) -> dict:
    """Images and patients used, images left out, how many why: reasons without names, numbers."""
    used = read_table(data / "manifest.csv", ("image_path", "patient_id"))
    images, patients = (len(set(column.tolist())) for column in used.values())
    reasons = [
        re.sub(r"'[^']*'|\S+\.\w{3,5}\b|[\d.]+(, [\d.]+)*", "..", reason)
        for reason in read_table(data / "excluded.csv", ("reason",))["reason"].tolist()
    ]
    counted = {"images": images, "images_left_out": len(reasons), "patients": patients}
    return counted | {"reasons": Counter(reasons).most_common()}


class Patches:
    """Several classes of patches, one after the other, as one sequence (N, S, S) uint16.

    They stay memory maps; the columns of their index files are read when asked for.
    """

    def __init__(self, parts: dict[str, np.ndarray], folder: Path | None = None):
        self.parts, self.folder = parts, folder
        self.starts = np.cumsum([0, *map(len, parts.values())])

    @classmethod
    def open(cls, data: Path, split: str, name: str = "") -> "Patches":
        """One class of a split, or all whose names begin alike.

        Raises ValueError when there is none, or its file is missing or damaged.
        """
        config, folder, parts = patch_config(data), Path(data) / "patches" / split, {}
        held, side = config["held"], config["patch_size"]
        for kind in [c for c in CLASSES if c.startswith(name) and f"{split}/{c}" in held]:
            shape = (held[f"{split}/{kind}"], side, side)
            parts[kind] = open_array(folder / f"{kind}.npy", shape, np.uint16)
        if not parts:
            raise ValueError(f"{data}: holds no {split}/{name}; found {', '.join(sorted(held))}")
        return cls(parts, folder)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: int | np.ndarray) -> np.ndarray:
        """Patch (S, S) of a row, or patches (n, S, S) of several."""
        arrays, which = list(self.parts.values()), np.searchsorted(self.starts, rows, "right") - 1
        if np.ndim(rows) == 0:
            return arrays[which][rows - self.starts[which]]
        return np.stack([arrays[w][r - self.starts[w]] for w, r in zip(which, rows, strict=True)])

    @functools.cached_property
    def kind(self) -> np.ndarray:
        """Class of each patch (N,)."""
        return np.repeat(list(self.parts), list(map(len, self.parts.values())))

    def column(self, name: str) -> np.ndarray:
        """A column of the index (N,) str: patient_id, image_uid, scale ..."""
        tables = [read_table(self.folder / f"{kind}.csv", (name,)) for kind in self.parts]
        return np.concatenate([table[name] for table in tables])


# --- Synthetic sets: reading (postprocess.py writes them) ---


@dataclass(frozen=True, eq=False)
class SyntheticSet:
    """A finished synthetic set, as far as classifiers and controls use it."""

    path: Path
    task: str  # mass, calcification, removal
    control: str  # "" or blob
    label: int  # 1 lesion added, 0 removed
    short: bool  # fewer accepted than requested
    requested: int
    fingerprint: str
    data_fingerprint: str  # of the patch set its sources are from
    generator: str  # hash of the weights
    gan: dict  # configuration of the generator's run
    combined: np.ndarray  # (N, S, S) uint16, a memory map
    index: dict[str, np.ndarray]


def open_synthetic(path: Path) -> SyntheticSet:
    """Raises ValueError when the set is unfinished, damaged or no synthetic set."""
    path = Path(path)
    facts, index = finished(path, "synthesize"), read_table(path / "index.csv", SYNTHETIC_COLUMNS)
    with reading(path / "config.json", "run synthesize again"):
        config = facts["config"]
        values = {name: config[name] for name in ("task", "control", "generator")}
        values |= {"data_fingerprint": config["data"], "requested": config["n"]}
        values |= {"short": facts["short"], "gan": dict(facts["gan"])}
        shape = (len(index["sample"]), config["patch_size"], config["patch_size"])
    values |= {"path": path, "index": index, "label": 0 if values["task"] == "removal" else 1}
    values["fingerprint"] = sha256(json.dumps(facts, sort_keys=True).encode(), path / "index.csv")
    return SyntheticSet(**values, combined=open_array(path / "combined.npy", shape, np.uint16))
