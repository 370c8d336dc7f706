"""Patch sets and synthetic sets on disk: writer, journal, workers, reader, leak checks."""

import concurrent.futures
import contextlib
import functools
import hmac
import json
import multiprocessing
import os
import shutil
import signal
import threading
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data import (
    CLASSES,
    KEYS,
    DecodedImage,
    PrepareConfig,
    SourceImage,
    breast_mask,
    patch_seed,
    source_images,
)
from support.files import open_array, read_json, read_table, replace_file, sha256, write_table
from support.runs import LOCKS, claim_folder, finish_folder, finished, progress, signals_held
from support.sources import (
    BOX,
    MANIFEST_COLUMNS,
    MANIFEST_OPTIONAL,
    SPLITS,
    Finding,
    check_findings,
    raise_all,
)

BBOX = tuple(f"bbox_{name}" for name in BOX)
INDEX_COLUMNS = (
    *("patch", "image_uid", "patient_id", *BOX),
    *("scale", "flip", "rotation", "seed", "tissue", *BBOX),
)
SYNTHETIC_COLUMNS = ("sample", "source_patch", "image_uid", "patient_id", "seed", "area", *BBOX)
NPY_HEADER = 128  # bytes before the first patch
FLIPPED = "Boxes in air, on tissue if rows were counted from the bottom: kept, look at them"
PSEUDONYM_KEY = "MAMGAN_PSEUDONYM_KEY"  # environment variable
_worker: dict = {}  # what a worker process works on


# --- Patch sets: one visit per image, in any number of processes ---


def _start_worker(images: list[SourceImage], config: PrepareConfig, out: Path) -> None:
    """Runs in each worker after the fork."""
    for lock in LOCKS:  # the folder is the parent's
        os.close(lock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker.update(images=images, config=config, out=out)


def _visit(index: int, tasks: list[tuple[str, int, int]]) -> dict:
    """Decode one image, cut and store the patches (key, patch, attempt) that are drawn from it."""
    image, config = _worker["images"][index], _worker["config"]
    visit = {"image": index, "uid": "", "reason": "", "dead": [], "flipped": 0}
    visit |= {"rows": [], "failed": []}
    try:
        field = DecodedImage(image, config)
    except (ValueError, OSError) as error:  # an OSError would name the file
        reason = getattr(error, "strerror", None) or str(error)
        return visit | {"reason": " ".join(reason.split()), "failed": tasks}
    visit |= {"uid": field.uid, "flipped": field.flipped()}
    # Whether a class has any place here may not depend on which patches ask first.
    for key in sorted({key for key, _, _ in tasks}):
        if not field.place(key, np.random.default_rng((config.seed, index, KEYS.index(key)))):
            visit["dead"].append(key)
    for key, patch, attempt in tasks:
        seed = patch_seed(config.seed, key, patch, attempt)
        alive = key not in visit["dead"]
        place = field.place(key, np.random.default_rng(seed)) if alive else None
        if place is None:
            visit["failed"].append((key, patch, attempt))
            continue
        pixels, bbox = field.cut(place)
        row = (*place["window"], f"{place['scale']:.6f}", place["flip"], place["rotation"])
        row += (seed, f"{place['tissue']:.4f}", *(bbox or ("",) * 4))
        text, body = ",".join(map(str, row)), np.ascontiguousarray(pixels).tobytes()
        os.pwrite(_store(_worker["out"], key), body, NPY_HEADER + patch * len(body))
        visit["rows"].append((key, patch, text, zlib.crc32(body, zlib.crc32(text.encode()))))
    return visit


@functools.cache
def _store(out: Path, key: str) -> int:
    """A class's patches, open in a worker; the parent may make the file anew and keeps none."""
    return os.open(out / "patches" / f"{key}.npy", os.O_RDWR)


def prepare(
    findings: list[Finding],
    out: Path,
    config: PrepareConfig,
    workers: int = 1,
    qc: int = 0,
    notes: Sequence[str] = (),
) -> None:
    """Findings -> patch set in `out`; goes on where it was interrupted.

    Raises ValueError: contradictory findings, a class that was asked for and is not there, the same
    image with two patients, no space; OSError: files that cannot be written.
    """
    raise_all("the source: found", check_findings(findings), "correct it")
    if config.spacing_mm and not 1e-3 < config.spacing_mm < 10:
        text = "expected 0.001 to 10, or 0 for native pixels"
        raise ValueError(f"--spacing-mm {config.spacing_mm}: {text}")
    run = PatchWriter(findings, out, config)
    base = os.path.commonpath([os.path.dirname(row.image_path) for row in findings])
    rows = [(os.path.relpath(row.image_path, base), row) for im in run.images for row in im.rows]
    rows = [(name, replace(row, image_path="", mask_path="")) for name, row in rows]
    settings = {"source": sha256(repr(rows).encode()), "key": run.hide("key")}
    with claim_folder(out, "prepare", asdict(config) | settings):
        if read_json(out / "config.json")["complete"]:
            click.echo(f"{out}: complete already", err=True)
        else:
            run.make_room()
            run.cut(workers)
            run.finish(notes)
        shutil.rmtree(out / "work", ignore_errors=True)
        if qc:
            contact_sheet(run.images, config, out, qc)


def _pseudonyms(wanted: bool) -> Callable[[str], str]:
    """Keyed hash of a patient id or path (HMAC-SHA256); without `wanted`, the text itself.

    The key comes from the environment and is kept nowhere: whoever holds it can link patients to
    pseudonyms, the outputs alone cannot, and the same key goes on with the same folder.
    """
    if not wanted:
        return lambda text: text
    key = os.environ.get(PSEUDONYM_KEY, "").encode()
    if len(key) < 16:
        raise ValueError(
            f"--pseudonymise: environment variable {PSEUDONYM_KEY} has {len(key)} characters; "
            f"expected a secret of 16 or more; export {PSEUDONYM_KEY}=$(openssl rand -hex 32)"
        )
    return lambda text: hmac.new(key, text.encode(), "sha256").hexdigest()[:16]


class PatchWriter:
    """`prepare` at work.

    A patch goes to the image of its first attempt; where that image has no place for it, to that of
    its next. Each image is visited once with all patches that want it; only patches sent on to an
    image that was visited already cause a second visit. `work/visits.jsonl` has a line per visit:
    what it holds is done, whenever the run is killed.
    """

    def __init__(self, findings: list[Finding], out: Path, config: PrepareConfig):
        self.out, self.config, self.hide = out, config, _pseudonyms(config.pseudonymise)
        self.images = source_images(findings, config, self.hide)
        self.sources = {  # "split/class": images it is drawn from
            key: [index for index, image in enumerate(self.images) if key in image.classes]
            for key in KEYS
            if config.counts.get(key)
        }
        self.skipped: dict[str, str] = {}
        self.texts = {key: [None] * config.counts[key] for key in self.sources}  # image, index row
        self.visits: dict[int, dict] = {}  # the last one of each image
        self.pending = defaultdict(list)  # image: patches that want it
        self.dead = {key: set() for key in self.sources}  # images without a place for a class
        self.same = defaultdict(set)  # image_uid: images
        for key in [key for key, indexes in self.sources.items() if not indexes]:
            hint = ", but see --normals-from-annotated" if key.endswith("/normal") else ""
            self.skip(key, f"the source holds none{hint}")
        if not self.sources:
            found = f"found no wanted class in {len(self.images)} images"
            text = "expected normal images, or boxes with a pathology; see --normals-from-annotated"
            raise ValueError(f"the source: {found}; {text} and --birads-as-pathology")
        splits = [split for _, split in {(im.patient_id, im.split) for im in self.images}]
        said = ", ".join(f"{split} {splits.count(split)}" for split in SPLITS)
        click.echo(f"patients: {said}", err=True)

    def skip(self, key: str, why: str, example: str = "") -> None:
        text = f"{key}: {why}; {self.config.counts[key]} patches wanted"
        if key in self.config.required:
            raise ValueError(f"--count {text}{example}")
        self.skipped[key] = why
        del self.sources[key], self.texts[key]
        click.echo(f"{text}: skipped", err=True)

    def make_room(self) -> None:
        """Files for every patch, their whole size reserved. Raises ValueError, OSError."""
        size, sizes = self.config.patch_size, {}
        for key, texts in self.texts.items():
            path, length = self.path(key), NPY_HEADER + 2 * len(texts) * size**2
            if not path.exists() or path.stat().st_size != length:
                sizes[path] = length, (len(texts), size, size)
        needed = sum(length for length, _ in sizes.values())
        needed += 500 * sum(map(len, self.texts.values()))  # indexes and the work folder
        if needed > (free := shutil.disk_usage(self.out).free):
            text = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise ValueError(f"{self.out}: {text}; make room or lower --count")
        (self.out / "work").mkdir(exist_ok=True)
        for path, (length, shape) in sizes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                header = {"descr": "<u2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                assert file.tell() == NPY_HEADER
                file.flush()
                os.posix_fallocate(file.fileno(), 0, length)

    def path(self, key: str) -> Path:
        return self.out / "patches" / f"{key}.npy"

    def stored(self, key: str, patch: int, text: str, checksum: int) -> bool:
        """Whether the patch of an index row is on the disk as it was cut."""
        size = 2 * self.config.patch_size**2
        with open(self.path(key), "rb") as file:
            body = os.pread(file.fileno(), size, NPY_HEADER + patch * size)
        return zlib.crc32(body, zlib.crc32(text.encode())) == checksum

    def send(self, key: str, patch: int, attempt: int) -> None:
        """Give a patch to the image of its first attempt from `attempt` that may have a place."""
        while key in self.sources:
            draw = patch_seed(self.config.seed, key, patch, attempt)
            image = self.sources[key][draw * len(self.sources[key]) >> 60]
            if image not in self.dead[key]:
                self.pending[image].append((key, patch, attempt))
                return
            attempt += 1

    def learn(self, visit: dict, rows: Iterable) -> None:
        """Take in a visit, this run's or an earlier one's.

        Raises ValueError: an image of two patients, or normal tissue of an image with a lesion.
        """
        index, image = visit["image"], self.images[visit["image"]]
        self.visits[index] = visit
        for key, patch, text, _ in rows:
            self.texts[key][patch] = index, text
        gone = image.classes if visit["reason"] else visit["dead"]
        for key in sorted(self.sources.keys() & gone):
            self.dead[key].add(index)
            if len(self.dead[key]) == len(self.sources[key]):
                example = f"; {image.name}: {self.reason(index)}"
                self.skip(key, "no image has a place for it", example)
        same = self.same[visit["uid"] or index]
        same.add(index)
        twins = sorted((self.images[i] for i in same), key=lambda twin: twin.name)
        names = " and ".join(twin.name for twin in twins)
        if len(patients := {twin.patient_id for twin in twins}) > 1:
            text = f"and yet of patients {' and '.join(sorted(patients))}; correct the source"
            raise ValueError(f"{names} are the same image, {text}")
        findings = {tuple((r.finding, r.pathology, r.bbox) for r in twin.rows) for twin in twins}
        if len(findings) > 1 and any("/normal" in key for twin in twins for key in twin.classes):
            text = "and yet with other findings; list these under one of the names"
            raise ValueError(f"{names} are the same image, {text}")

    def tasks(self, index: int) -> list[tuple[str, int, int]]:
        """What an image is visited for; what it is known to have no place for goes on."""
        tasks = self.pending.pop(index, [])
        for key, patch, attempt in tasks:
            if index in self.dead[key]:
                self.send(key, patch, attempt + 1)
        return [task for task in tasks if index not in self.dead[task[0]]]

    def cut(self, workers: int) -> None:
        """Cut every patch that no earlier run has cut."""
        record = self.out / "work" / "visits.jsonl"
        for visit in _read_lines(record):
            self.learn(visit, [row for row in visit.pop("rows") if self.stored(*row)])
        for key, texts in self.texts.items():
            for patch in [patch for patch, text in enumerate(texts) if text is None]:
                self.send(key, patch, 0)
        total, left = (sum(map(len, d.values())) for d in (self.texts, self.pending))
        wanted = sorted({index for indexes in self.sources.values() for index in indexes})
        queue, running = deque(index for index in wanted if index not in self.visits), {}
        with (
            open(record, "a", encoding="utf-8") as lines,
            progress(total, "patches", done=total - left) as advance,
            _pool(workers, self.images, self.config, self.out) as pool,
        ):
            while queue or running or self.pending:
                while (queue or self.pending) and len(running) < 2 * workers:
                    index = queue.popleft() if queue else next(iter(self.pending))
                    if (tasks := self.tasks(index)) or index not in self.visits:
                        running[pool.submit(_visit, index, tasks)] = index
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED")[0]:
                    try:
                        visit = future.result()
                    except concurrent.futures.process.BrokenProcessPool:
                        names = ", ".join(self.images[index].name for index in running.values())
                        raise ValueError(
                            f"a worker process died at one of {names}; leave the damaged one out, "
                            "or give fewer --workers if the memory was too small"
                        ) from None
                    del running[future]
                    failed = visit.pop("failed")
                    lines.write(json.dumps([_checksum(visit), visit]) + "\n")
                    lines.flush()
                    rows = visit.pop("rows")
                    self.learn(visit, rows)
                    for key, patch, attempt in failed:
                        self.send(key, patch, attempt + 1)
                    advance(len(rows))

    def reason(self, index: int) -> str:
        """Why an image gave no patch."""
        dead = [key for key in sorted(self.dead) if index in self.dead[key]]
        if index not in self.visits:
            if any(row.finding and not row.bbox for row in self.images[index].rows):
                return "a finding without a box: nobody knows where its lesion lies"
            return f"none of its findings is a class wanted in {self.images[index].split}"
        if dead and not self.visits[index]["reason"]:
            return f"no window with enough tissue for {dead[0]}"
        return self.visits[index]["reason"] or "usable; no patch happened to be drawn from it"

    def finish(self, notes: Sequence[str]) -> None:
        """Write the tables, then mark the patch set whole."""
        images, out = self.images, self.out
        for key in self.skipped:
            self.path(key).unlink(missing_ok=True)
        for key, texts in self.texts.items():
            with open(self.path(key), "rb") as file:
                os.fsync(file.fileno())
            rows = (
                (patch, self.visits[index]["uid"], images[index].patient_id, *text.split(","))
                for patch, (index, text) in enumerate(texts)
            )
            write_table(self.path(key).with_suffix(".csv"), INDEX_COLUMNS, rows)
        used = {index for texts in self.texts.values() for index, _ in texts}
        excluded = [(im.name, self.reason(i)) for i, im in enumerate(images) if i not in used]
        write_table(out / "excluded.csv", ("image_path", "reason"), excluded)
        splits = {image.patient_id: image.split for image in images}
        write_table(out / "splits.csv", ("patient_id", "split"), sorted(splits.items()))
        rows = (
            (
                *(image.name, image.patient_id, row.laterality, row.view, row.finding),
                *(row.pathology, *(row.bbox or ("",) * 4)),
                *(row.mask_path and self.hide(row.mask_path), *(row.spacing_mm or ("",) * 2)),
                image.split,
            )
            for image in (images[index] for index in sorted(used))
            for row in image.rows
        )
        write_table(out / "manifest.csv", MANIFEST_COLUMNS + MANIFEST_OPTIONAL, rows)
        used = f"{len(images) - len(excluded)} of {len(images)} images gave patches"
        click.echo(f"{used}{'; the others: excluded.csv' if excluded else ''}", err=True)
        if not self.texts:
            raise ValueError(
                f"{out}: no patch could be cut; excluded.csv says why for each image, the first: "
                f"{excluded[0][1]}; give other options and a new --out"
            )
        duplicates = sorted(sorted(same) for same in self.same.values() if len(same) > 1)
        duplicates = [[images[index].name for index in same] for same in duplicates]
        said = [f"the same image under {len(n)} names: {', '.join(n)}" for n in duplicates]
        if flipped := sum(visit["flipped"] for visit in self.visits.values()):
            said.append(f"{FLIPPED}: {flipped}.")
            notes = [*notes, said[-1]]
        for text in said:
            click.echo(text, err=True)
        finish_folder(
            out,
            counts={key: len(texts) for key, texts in self.texts.items()},
            skipped=self.skipped,
            images={"used": len(used), "excluded": len(excluded)},
            patients={split: list(splits.values()).count(split) for split in SPLITS},
            duplicates=duplicates,
            notes=list(notes),
        )


@contextlib.contextmanager
def _pool(workers: int, *work: object) -> Iterator[concurrent.futures.Executor]:
    """Worker processes that end at once when the block is left by an exception."""
    before = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=work
    )
    with pool:
        try:
            with signals_held():  # Python drops a KeyboardInterrupt that comes while it forks
                pool.submit(os.getpid).result()  # forks all workers
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


def _read_lines(path: Path) -> Iterator[dict]:
    """The visits of earlier runs, without lines that a kill cut off or that were damaged."""
    if path.exists():
        with open(path, "a+", encoding="utf-8", errors="replace") as file:
            file.write("\n")  # a cut line stays by itself
            file.seek(0)
            for line in file:
                with contextlib.suppress(ValueError, TypeError):
                    checksum, visit = json.loads(line)
                    if checksum == _checksum(visit):
                        yield visit


def _checksum(visit: dict) -> int:
    return zlib.crc32(json.dumps(visit).encode())


def contact_sheet(images: list[SourceImage], config: PrepareConfig, out: Path, number: int) -> None:
    """`out/qc.png`: images with mask outline, lesion boxes and patch windows drawn in."""
    colours = dict(zip(CLASSES, ("cyan", "red", "orange", "magenta", "yellow"), strict=True))
    kept = set(read_table(out / "manifest.csv", ("image_path",))["image_path"].tolist())
    images = [image for image in images if image.name in kept]
    images = [images[i] for i in np.unique(np.linspace(0, len(images) - 1, number).astype(int))]
    windows = defaultdict(list)
    for key in read_json(out / "config.json")["counts"]:
        table = read_table(out / "patches" / f"{key}.csv", ("image_uid", *BOX))
        for uid, *window in zip(*table.values(), strict=True):
            windows[uid].append((colours[key.split("/")[1]], 0.7, map(float, window)))
    shape = -(-len(images) // 4), min(4, len(images))
    figure = Figure((4 * shape[1], 4.6 * shape[0]), dpi=100)
    for place, image in enumerate(images, start=1):
        field, first = DecodedImage(image, config), image.rows[0]
        (height, width), step = field.display.shape, max(field.display.shape) // 900 + 1
        axes = figure.add_subplot(*shape, place)
        extent = (0, width, height, 0)
        axes.imshow(field.display[::step, ::step], cmap="gray", extent=extent)
        outline = breast_mask(field.display)[::step, ::step]
        at = np.arange(0, width, step), np.arange(0, height, step)
        axes.contour(*at, outline, [0.5], colors="lime", linewidths=0.8)
        shown = windows[field.uid][:: len(windows[field.uid]) // 12 + 1]
        for row in image.rows:
            colour = colours.get(f"{row.pathology}_{row.finding}", "white")
            shown += [(colour, 2, row.bbox)] if row.bbox else []
        for colour, line, (row0, col0, row1, col1) in shown:
            style = {"fill": False, "edgecolor": colour, "linewidth": line}
            box = Rectangle((col0, row0), col1 - col0, row1 - row0, **style)
            axes.add_patch(box)
        title = f"{field.uid}  {image.split}  {first.laterality} {first.view}  "
        title += f"{len(windows[field.uid])} patches, {len(shown)} boxes drawn"
        axes.set(aspect=field.side[1] / field.side[0], xticks=[], yticks=[])
        axes.set_title(title, fontsize=7)
    text = "lime: breast mask; thick: lesion boxes; thin: patch windows; "
    text += ", ".join(f"{name} {colour}" for name, colour in colours.items())
    figure.suptitle(text, fontsize=8)
    figure.tight_layout()
    with replace_file(out / "qc.png") as file:
        figure.savefig(file, format="png")


# --- Patch sets: reading ---


def patch_config(data: Path) -> dict:
    """The configuration of a finished patch set, with its fingerprint. Raises ValueError."""
    found = finished(Path(data), "prepare")
    config, counts = found["config"], found.get("counts")
    sizes = [config.get("patch_size"), *(counts.values() if isinstance(counts, dict) else [None])]
    if not all(isinstance(n, int) and n > 0 for n in sizes) or not set(counts).issubset(KEYS):
        raise ValueError(f"{data}/config.json: damaged (patch_size or counts); run prepare again")
    notes = {"notes": found["notes"]} if found.get("notes") else {}  # BI-RADS as pathology, say
    return config | {"held": counts, "fingerprint": fingerprint(data)} | notes


def fingerprint(data: Path) -> str:
    """Names a patch set in everything made from it: a hash over options, splits and indexes."""
    data = Path(data)
    config = json.dumps(read_json(data / "config.json").get("config"), sort_keys=True)
    return sha256(config.encode(), data / "splits.csv", *sorted(data.glob("patches/*/*.csv")))


def open_patches(data: Path, split: str, name: str) -> np.ndarray:
    """(N, S, S) uint16 memory map of one class. Raises ValueError when it is missing or damaged."""
    config, key = patch_config(data), f"{split}/{name}"
    if key not in config["held"]:
        raise ValueError(f"{data}: holds no {key}; found {', '.join(sorted(config['held']))}")
    shape = (config["held"][key], config["patch_size"], config["patch_size"])
    return open_array(Path(data) / "patches" / f"{key}.npy", shape, np.uint16)


def split_of(data: Path) -> dict[str, str]:
    """Patient -> split."""
    table = read_table(Path(data) / "splits.csv", ("patient_id", "split"))
    return dict(zip(table["patient_id"].tolist(), table["split"].tolist(), strict=True))


# --- Synthetic sets: reading (postprocess.py writes them) ---


@dataclass(frozen=True, eq=False)
class SyntheticSet:
    """A finished synthetic set; arrays are memory maps (N, S, S)."""

    path: Path
    task: str  # mass, calcification, removal
    control: str  # "" or blob
    label: int  # 1 lesion added, 0 removed
    patch_size: int
    short: bool  # fewer accepted than requested
    requested: int
    fingerprint: str
    data_fingerprint: str  # of the patch set its sources are from
    generator: str  # hash of the weights
    input: np.ndarray  # uint16
    combined: np.ndarray  # uint16
    lesion: np.ndarray  # int32, combined - input
    mask: np.ndarray  # bool, the object before expansion
    index: dict[str, np.ndarray]


def open_synthetic(path: Path) -> SyntheticSet:
    """Raises ValueError when the set is unfinished, damaged or no synthetic set."""
    path = Path(path)
    found = finished(path, "synthesize")
    index = read_table(path / "index.csv", SYNTHETIC_COLUMNS)
    try:
        config = found["config"]
        values = {name: str(config[name]) for name in ("task", "control", "generator")}
        values |= {"data_fingerprint": str(config["data"]), "requested": int(config["n"])}
        values |= {"short": bool(found["short"]), "patch_size": int(config["patch_size"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}/config.json: damaged ({error}); run synthesize again") from None
    shape = (len(index["sample"]), values["patch_size"], values["patch_size"])
    types = {"input": np.uint16, "combined": np.uint16, "lesion": np.int32, "mask": np.bool_}
    return SyntheticSet(
        path=path,
        label=0 if values["task"] == "removal" else 1,
        fingerprint=sha256(json.dumps(found, sort_keys=True).encode(), path / "index.csv"),
        **{name: open_array(path / f"{name}.npy", shape, t) for name, t in types.items()},
        index=index,
        **values,
    )


def check_synthetic(syn: SyntheticSet, data: Path) -> None:
    """Raises ValueError unless every sample comes from a training patient of this patch set.

    Sets carry the hash of the patch set and of each source image: both are compared, not trusted.
    """
    config, splits = patch_config(data), split_of(data)
    side, again = config["patch_size"], f"synthesize it again from {data}"
    if syn.patch_size != side:
        raise ValueError(f"{syn.path}: patches of {syn.patch_size} px; expected {side} as {data}")
    if syn.data_fingerprint != config["fingerprint"]:
        raise ValueError(f"{syn.path}: made from another patch set; {again}")
    leaked = sorted({p for p in syn.index["patient_id"].tolist() if splits.get(p) != "train"})
    if leaked:
        first = f"such as {leaked[0]} ({splits.get(leaked[0], 'unknown')})"
        text = f"{len(leaked)} source patients are not in train, {first}"
        raise ValueError(f"{syn.path}: {text}; {again}")
    columns, trained = ("image_uid", "patient_id"), set()
    for path in Path(data).glob("patches/train/*.csv"):
        trained |= set(zip(*read_table(path, columns).values(), strict=True))
    if foreign := set(zip(*(syn.index[c] for c in columns), strict=True)) - trained:
        first = "such as {} of {}".format(*min(foreign))
        text = f"{len(foreign)} source images are not in train, {first}"
        raise ValueError(f"{syn.path}: {text}; {again}")


class Patches:
    """Several classes of patches, one after the other, as one sequence (N, S, S) uint16.

    They stay memory maps; the columns of their index files are read when asked for.
    """

    def __init__(self, parts: dict[str, np.ndarray], folder: Path | None = None):
        self.parts, self.folder = parts, folder
        self.starts = np.cumsum([0, *map(len, parts.values())])

    @classmethod
    def open(cls, data: Path, split: str, name: str = "") -> "Patches":
        """One class of a split, or all whose names begin alike. Raises ValueError without any."""
        held = patch_config(data)["held"]
        names = [c for c in CLASSES if c.startswith(name) and f"{split}/{c}" in held]
        parts = {c: open_patches(data, split, c) for c in names or [name]}
        return cls(parts, Path(data) / "patches" / split)

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
