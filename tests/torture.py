"""Nothing lost, nothing leaked, nothing crashes: every command killed, starved, fed bad files.

    python -m tests.torture [--kills 50] [--mutations 2000] [--seed 0] [--first N] [--only PART]...

Each command runs as users type it, in a forked child (torch is imported once), on small phantoms
whose headers are full of planted identifiers and whose names are as odd as names can be. Prints a
line per part and per finding; exit status 1 when there is a finding.
"""

import contextlib
import csv
import functools
import io
import json
import mmap
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import matplotlib.backends.backend_agg  # noqa: F401  imported once here, not in every child
import numpy as np
import pydicom
import torch
import torch._dynamo  # the same: the optimisers ask for it
from PIL import Image
from pydicom import Dataset, uid
from pydicom.datadict import DicomDictionary
from pydicom.encaps import encapsulate

import mamgan
from benchmarks.bench_synthesize import square, write_run
from support import files, mammogram, patchset, phantom, runs, sources

# Limits of a command on a bad file: of processor time, on the clock, of memory
SECONDS, CLOCK_SECONDS, MIB = 10, 60, 2048
WORD, DAY, CLOCK, UID_ROOT = "QZIDENTQZ", "19170403", "041917.170419", "1.3.77.9135724"
SECRETS = (WORD, DAY, CLOCK, UID_ROOT, "9135724")  # in the headers
PATIENT, PLACE = "QZPATIENTQZ", "QZPLACEQZ"  # in the manifest; gone under --pseudonymise
EVIL = "<img src=x onerror=alert(1)>"  # as a folder's name and as a value in config.json

# --- A command in a forked child ---


@dataclass(frozen=True)
class Ended:
    code: int  # negative: killed by this signal
    text: str  # standard output and error
    seconds: float  # on the clock
    work: float  # seconds of processor time, with its workers
    mib: int  # peak of the resident memory, of the command or of its largest worker


def start(line: list, before: Callable[[], object] = int) -> tuple[int, io.FileIO]:
    """Fork and run `mamgan.py LINE`; gives the process and the file that holds its output."""
    output = tempfile.TemporaryFile()
    sys.stdout.flush()
    if pid := os.fork():
        return pid, output
    code = 70
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        before()
        mamgan.cli.main([str(part) for part in line], prog_name="mamgan.py")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(pid: int, output: io.FileIO, limit: float = 300, number: int = signal.SIGKILL) -> Ended:
    """Wait; after `limit` seconds send the signal, and wait on."""
    began, waiting = time.monotonic(), os.pidfd_open(pid)
    if not select.select([waiting], [], [], limit)[0]:
        os.kill(pid, number)
        if not select.select([waiting], [], [], 60)[0]:
            os.kill(pid, signal.SIGKILL)
    os.close(waiting)
    _, status, used = os.wait4(pid, 0)
    seconds = time.monotonic() - began
    output.seek(0)
    text = output.read().decode("utf-8", "surrogateescape")
    output.close()
    work = used.ru_utime + used.ru_stime
    return Ended(os.waitstatus_to_exitcode(status), text, seconds, work, used.ru_maxrss >> 10)


def call(line: list, limit: float = 300, before: Callable[[], object] = int) -> Ended:
    return end(*start(line, before), limit)


def guard_memory() -> None:
    """For the machine's sake, well above the limit: what is over the limit is measured."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30),) * 2)


PEAK = {"seconds": 0.0, "MiB": 0}  # of all ends judged in this part


def fault(ended: Ended, names: object = "") -> str:
    """What is wrong with an end; "" for success and for one clear message that says where.

    names: a folder that the message has to name, if it names no option and no step
    """
    message = ended.text[ended.text.find("Error: ") :]
    PEAK["seconds"], PEAK["MiB"] = max(PEAK["seconds"], ended.work), max(PEAK["MiB"], ended.mib)
    if ended.code < 0:
        return f"killed by signal {-ended.code} after {ended.seconds:.1f} s"
    if ended.work > SECONDS:
        return f"took {ended.work:.1f} s"
    if ended.mib > MIB:
        return f"took {ended.mib} MiB"
    if "Traceback" in ended.text or "MemoryError" in ended.text or "allocate" in ended.text:
        return "a traceback, or no memory"
    if ended.code not in (0, 1):
        return f"exit status {ended.code}"
    if ended.code == 1 and len(re.findall("^Error: ", ended.text, re.M)) != 1:
        return "not one message"
    named = (str(names), "Error: --", "Error: step ")  # a file, an option, a step of training
    if ended.code == 1 and (len(message) > 3000 or not any(name in message for name in named)):
        return "a message that does not say which file or option, or is too long"
    return "holds an identifier" if any(s in ended.text for s in SECRETS) else ""


class Findings:
    """What went wrong, and how often what was done."""

    def __init__(self):
        self.counts, self.found = Counter(), 0

    def check(self, wrong: object, what: str, ended: Ended | None = None) -> None:
        if wrong:
            text = f"\n    {ended.text.strip()[-1500:]}" if ended else ""
            self.found += 1
            print(f"FOUND {what}: {wrong}{text}", flush=True)


# --- Phantoms full of identifiers ---

VALUES = dict.fromkeys(("PN", "LO", "SH", "ST", "LT", "UT", "UC", "UR", "AE", "CS"), WORD)
VALUES |= {"DA": DAY, "TM": CLOCK, "DT": DAY + CLOCK, "DS": "9135724.5", "IS": "9135724"}
KEPT = {*mammogram.KEYWORDS, "SpecificCharacterSet", "CodeValue", "CodingSchemeDesignator"}


@functools.cache
def secrets() -> Dataset:
    """Every text, date, time, UID and decimal attribute of the DICOM dictionary, planted.

    That is more than the basic profile of PS3.15 Annex E lists; what decides how an image is shown
    is left out.
    """
    ds = Dataset()
    with pydicom.config.disable_value_validation():
        for tag, (vr, *_, keyword) in DicomDictionary.items():
            if tag >> 16 > 0x0004 and keyword and keyword not in KEPT and vr in {*VALUES, "UI"}:
                ds.add_new(tag, vr, VALUES.get(vr, f"{UID_ROOT}.{tag}"))
        ds.add_new(0x60004000, "LT", WORD)  # comments on an overlay
        for group, vr, value in ((0x13, "LO", WORD), (0x29, "OB", WORD.encode() + b"\0")):
            ds.private_block(group, WORD, create=True).add_new(1, vr, value)
    return ds


def few() -> Dataset:
    """A handful of the planted attributes, for the many items of sequences."""
    ds, keywords = Dataset(), ("PatientName", "PatientID", "StudyDate", "CodeMeaning", "DeviceUID")
    for keyword in (*keywords, "LUTExplanation", "ReferencedSOPInstanceUID", "PatientComments"):
        ds[keyword] = secrets()[keyword]
    return ds


def plant(ds: Dataset) -> Dataset:
    """A header full of secrets: also in sequences, in codes' meanings, in private attributes."""
    for keyword in ("ViewCodeSequence", "AnatomicRegionSequence", "VOILUTSequence"):
        for item in ds.get(keyword, ()):
            item.update(few())
    ds.update(secrets())
    deep = few()
    deep.SourceImageSequence = [secrets()]
    for keyword in ("RequestAttributesSequence", "OtherPatientIDsSequence", "SourceImageSequence"):
        ds.add_new(keyword, "SQ", [few(), deep])
    ds.SOPInstanceUID, ds.StudyInstanceUID = f"{UID_ROOT}.1", f"{UID_ROOT}.2"
    ds.ImageType = ["ORIGINAL", "PRIMARY", WORD]
    for keyword in ("ViewPosition", "Laterality", "DetectorType", "ConversionType", "RescaleType"):
        setattr(ds, keyword, WORD)  # where a few words are allowed, and kept
    ds.preamble = WORD.encode().ljust(128, b"\0")
    ds.file_meta.SourceApplicationEntityTitle = WORD
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return ds


SPLIT_OF = (*("train", "val", "test") * 3, "train")  # nine malignant masses, then a benign one
ODD = ("-x", ".x", "a b", "it's", 'say "x"', "a,b;c", "Zoë ✓", "new\nline", "100% {x}", "<b>&$(x)")


def write_source(folder: Path) -> Path:
    """Both CC views of ten patients, planted, and their manifest."""
    folder.mkdir(parents=True)
    rows, people = [], {}
    for number in range(40):
        who = phantom.patient(0, number)
        people.setdefault((who.finding, who.pathology), []).append((number, who))
    chosen = people["mass", "malignant"][:9] + people["mass", "benign"][:1]
    for (number, who), split, odd in zip(chosen, SPLIT_OF, ODD, strict=True):
        for side in "LR":
            shade, mask, _ = phantom.render(0, number, side, "CC")
            file = io.BytesIO(phantom.dicom(0, number, side, "CC", shade, who.spacing))
            name = f"{odd}{side}{PLACE}"
            plant(pydicom.dcmread(file)).save_as(folder / f"{name}.dcm")
            row = [f"{name}.dcm", f"{PATIENT}{number}{EVIL}", side, "CC", "", "normal", *[""] * 5]
            if mask.any():
                down, across = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
                box = down[0], across[0], down[-1] + 1, across[-1] + 1
                Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name}.png")
                row[4:] = who.finding, who.pathology, *box, f"{name}.png"
            rows.append([*row, split])
    columns = (*sources.MANIFEST_COLUMNS, "mask_path", "split")
    files.write_table(folder / "manifest.csv", columns, rows)
    return folder / "manifest.csv"


# --- The chain of commands, as small as it gets ---

HELD = {"train/normal": 10, "train/malignant_mass": 10, "train/benign_mass": 6}
HELD |= {f"{split}/{name}": 8 for split in ("val", "test") for name in ("normal", "malignant_mass")}
COUNTS = [f"--count={key}={n}" for key, n in HELD.items()]
GAN = "--batch-size 2 --iters-base 2 --iters-fade 1 --iters-final 3 --g-base 2 --g-center 8 "
GAN += "--d-base 2 --d-center 8 --log-every 2 --save-every 3 --preset tiny --device cpu"
CLASSIFIER = "--preset tiny --samples 64 --batch-size 8 --width 8 --evaluate-every 16 --device cpu"
MADE = "--device cpu --seed 0"
COMMANDS = ("patches", "gan", "set", "images", "cls", "report")  # what is killed and starved
RESUMED = ("gan", "cls", "set")


class World:
    """A folder for each command of the chain, and the line that makes it."""

    def __init__(self, root: Path):
        self.root, self.manifest = root, root / f"{PLACE}{EVIL}" / "manifest.csv"
        self.seconds: dict[str, float] = {}
        self.operations: dict[str, int] = {}  # on files
        self.printed = ""  # by all commands

    def at(self, name: str) -> Path:
        return self.root / f"{name}{EVIL}"

    def line(self, name: str, out: Path | None = None) -> list:
        at, out = self.at, out or self.at(name)
        data = ["--data", at("patches")]
        classifier = ["train-cls", *data, *CLASSIFIER.split(), "--run", out]
        made = ["synthesize", "--gan", at("bump"), *MADE.split(), "--out", out]
        source = self.manifest.parent
        patches = ["prepare", self.manifest, "--preset", "tiny", "--workers", 2, *COUNTS, "--qc", 2]
        report = ["evaluate", *data, "--baseline", at("cls"), "--device", "cpu"]
        return {
            "patches": [*patches, "--out", out],
            "gan": ["train-gan", "--task=mass", *data, *GAN.split(), "--run", out],
            "set": [*made, *data, "-n", 12],
            "images": self.reinsert([source / f"{o}L{PLACE}.dcm" for o in ODD[:8]], out),
            "cls": classifier,
            "cls50": [*classifier, "--synthetic", at("set")],
            "report": [*report, "--augmented", at("cls50"), "--synthetic", at("set"), "--out", out],
        }[name]

    def reinsert(self, images: list[Path], out: Path) -> list:
        line = ["synthesize", "--gan", self.at("bump"), *MADE.split(), "--out", out]
        return [*line, *(f"--image={image}" for image in images)]

    def make(self) -> "World":
        """Run every command once, uninterrupted; the generator is one set by hand."""
        write_source(self.manifest.parent)
        for name in ("patches", "gan", "set", "images", "cls", "cls50", "report"):
            if name == "set":
                size = {
                    "patch_size": 64,
                    "g_base": 4,
                    "g_center": 64,
                    "sn_g": False,
                    "noise_cells": 0,
                }
                size["spacing_mm"] = 0.33
                torch.manual_seed(0)
                write_run(self.at("bump"), self.at("patches"), lesion=square, gain=0.4, **size)
            counter = mmap.mmap(-1, 8)
            ended = call(self.line(name), before=partial(die_at, 0, self.at(name), counter))
            if ended.code:
                raise SystemExit(f"{name} ends with {ended.code}\n{ended.text}")
            self.seconds[name], self.printed = ended.seconds, self.printed + ended.text
            self.operations[name] = struct.unpack("q", counter)[0]
        return self

    @functools.cache  # noqa: B019
    def unfinished(self, name: str) -> Path:
        """A folder whose command was killed a little after the middle."""
        out, at = self.root / f"unfinished {name}", 2 * self.operations[name] // 3
        ended = call(self.line(name, out), before=partial(die_at, at, out))
        assert ended.code == -signal.SIGKILL, ended
        return out


def die_at(number: int, out: Path, counter: mmap.mmap | None = None) -> None:
    """SIGKILL this process just before its operation `number` on a file below `out`."""
    seen, us = 0, os.getpid()
    events = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in events and str(args[0]).startswith(str(out)) and os.getpid() == us:
            seen += 1
            if counter:
                counter[:] = struct.pack("q", seen)
            if seen == number:
                os.kill(us, signal.SIGKILL)

    sys.addaudithook(hook)


def plain(value: object) -> object:
    """A checkpoint without tensors, whose files differ with nothing in them changed."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of log.jsonl without the fields that are times, of a checkpoint its values."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if "log.jsonl" in found:
        rows = [json.loads(line) for line in found["log.jsonl"].splitlines()]
        rows = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]
        found["log.jsonl"] = json.dumps(rows).encode()
    if "checkpoint.pt" in found:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        found["checkpoint.pt"] = repr(plain(state)).encode()
    return found


def difference(folder: Path, reference: Path) -> str:
    """The files in which two folders differ; "" when they hold the same bytes."""
    a, b = contents(folder), contents(reference)
    return ", ".join(sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)))


# --- Interruption ---


def killed(world: World, kills: int, rng: random.Random, scratch: Path) -> Findings:
    """SIGKILL at random moments, half of them just before an operation on a file."""
    result = Findings()
    for name in COMMANDS:
        left, rounds = kills, 0
        while left:
            out, rounds = scratch / f"killed{EVIL}", rounds + 1
            while left:
                limit, before = rng.uniform(0, world.seconds[name]), int
                if rng.random() < 0.5:
                    at = rng.randint(1, world.operations[name])
                    limit, before = 300, partial(die_at, at, out)
                ended = call(world.line(name, out), limit, before)
                if ended.code != -signal.SIGKILL:
                    break
                left -= 1
                result.counts["killed"] += 1
            else:
                ended = call(world.line(name, out))
            result.counts["resumed"] += 1
            result.check(ended.code, f"killed {name} {rounds}", ended)
            result.check(difference(out, world.at(name)), f"killed {name} {rounds} differs")
            shutil.rmtree(out)
    return result


def stopped(world: World, stops: int, rng: random.Random, scratch: Path) -> Findings:
    """SIGINT and SIGTERM at random moments: one message within two seconds, then on to the end."""
    result, out, slowest = Findings(), scratch / "stopped", 0.0
    for name in COMMANDS:
        for number in range(stops):
            child = start(world.line(name, out))
            while not (out / "config.json").exists():
                time.sleep(0.01)
            delay = rng.uniform(0, world.seconds[name])
            ended = end(*child, delay, (signal.SIGINT, signal.SIGTERM)[number % 2])
            if ended.code:
                result.counts["stopped"] += 1
                slowest = max(slowest, ended.seconds - delay)
                result.check(fault(ended), f"stopped {name} {number}", ended)
                advice = "stopped; the same command goes on from here"
                result.check(advice not in ended.text, f"stopped {name}: other words", ended)
            else:
                shutil.rmtree(out)
        if out.exists():
            ended = call(world.line(name, out))
            result.check(fault(ended), f"stopped {name}, on again", ended)
            result.check(difference(out, world.at(name)), f"stopped {name} differs")
            shutil.rmtree(out)
    result.counts["slowest stop, ms"] = round(1000 * slowest)
    return result


def starved(world: World, scratch: Path, commands: tuple[str, ...]) -> Findings:
    """Files that may not grow, as on a full disk, and a second process in the same folder.

    Each ends in one message; with more room the same command goes on to the same bytes.
    """
    result = Findings()
    for name in commands:
        reference, out = world.at(name), scratch / f"limit-{name}"
        for size in (2**k for k in range(11, 40)):  # bytes that a single file may have
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
            ended = call(world.line(name, out), before=limit)
            if not ended.code:
                break
            result.counts["files limited"] += 1
            wrong = fault(ended) or ("File too large" not in ended.text and "another message")
            result.check(wrong, f"{name} with files of {size} bytes at most", ended)
        result.check(difference(out, reference), f"{name} differs after limits")
        out = scratch / f"two-{name}"
        child = start(world.line(name, out))
        while not (out / "config.json").exists():
            time.sleep(0.002)
        os.kill(child[0], signal.SIGSTOP)
        second = call(world.line(name, out))
        os.kill(child[0], signal.SIGCONT)
        result.counts["second processes refused"] += 1
        refused = second.code == 1 and "another process is writing there" in second.text
        result.check(not refused, f"a second {name} in the same folder is not refused", second)
        ended = end(*child)
        result.check(fault(ended) or difference(out, reference), f"the first {name}", ended)
    return result


# --- Privacy, leaks between splits ---


def pieces(path: Path) -> Iterator[bytes]:
    """A file as it is, and what is packed inside it: members, pictures' texts, data URIs, JSON."""
    raw = path.read_bytes()
    yield raw
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            yield from (m.filename.encode() + members.read(m) for m in members.infolist())
    for uri in re.findall(rb"data:image/png;base64,([A-Za-z0-9+/=]+)", raw):
        yield texts_of(b64decode(uri))
    if raw[1:4] == b"PNG" or raw[:2] == b"\xff\xd8":
        yield texts_of(raw)
    if path.suffix == ".json":
        yield repr(json.loads(raw)).encode()


def texts_of(picture: bytes) -> bytes:
    with Image.open(io.BytesIO(picture)) as image:
        image.load()
        return repr((image.info, getattr(image, "text", ""), dict(image.getexif()))).encode()


def leaked(folders: list[Path], words: tuple[str, ...]) -> Iterator[str]:
    """Files below the folders that hold one of the words, in any usual encoding, or in a name."""
    coded = [w.lower().encode(code) for w in words for code in ("utf-8", "utf-16-le", "utf-16-be")]
    for path in (p for folder in folders for p in sorted(folder.rglob("*"))):
        found = [path.name.encode(), *(pieces(path) if path.is_file() else ())]
        if any(word in piece.lower() for piece in found for word in coded):
            yield str(path)


def private(world: World, scratch: Path) -> Findings:
    """No planted identifier in any file or line; with --pseudonymise no patient id or path."""
    result = Findings()
    held = world.manifest.with_name(f"-xL{PLACE}.dcm").read_bytes()
    for word in SECRETS:  # each of them is really there to be found
        result.check(held.count(word.encode()) < 9, f"{word} is not planted")
    planted = pydicom.dcmread(io.BytesIO(held)).iterall()
    result.counts["attributes planted in a file"] = sum(1 for _ in planted)
    folders = [world.at(name) for name in ("patches", "gan", "set", "images", "cls50", "report")]
    out = scratch / "pseudonyms"
    ended = call(
        [*world.line("patches", out), "--pseudonymise"],
        before=partial(os.environ.update, {patchset.PSEUDONYM_KEY: "0123456789abcdef"}),
    )
    result.check(ended.code, "prepare --pseudonymise", ended)
    for where, words in ((folders, SECRETS), ([out], (*SECRETS, PATIENT, PLACE))):
        result.counts["files searched"] += sum(p.is_file() for f in where for p in f.rglob("*"))
        for name in leaked(where, words):
            result.counts["leaked"] += 1
            result.check("holds an identifier", name)
    for text, words in ((world.printed, SECRETS), (ended.text, (*SECRETS, PATIENT, PLACE))):
        result.check(any(w in text for w in words), "printed lines hold an identifier")
    return result


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def swapped(line: list, old: Path, new: Path) -> list:
    """A line with a damaged or forged folder in place of the sound one."""
    return [new if part == old else part for part in line]


def parted(world: World, scratch: Path) -> Findings:
    """No patient and no image in two splits; forged sets are refused."""
    result, patches, seen = Findings(), world.at("patches"), {}
    for index in sorted((patches / "patches").glob("*/*.csv")):
        split = index.parent.name
        for key in (row[c] for row in table(index) for c in ("patient_id", "image_uid")):
            other = seen.setdefault(key, split)
            result.counts["leaked"] += other != split
            result.check(other != split and f"in {other} and {split}", f"{index.name} {key}")
    foreign = table(patches / "patches/test/normal.csv")[0]
    for column in ("patient_id", "image_uid"):
        forged = shutil.copytree(world.at("set"), scratch / f"forged {column}")
        rows = table(forged / "index.csv")
        rows[3][column] = foreign[column]
        files.write_table(forged / "index.csv", tuple(rows[0]), (row.values() for row in rows))
        for name in ("cls50", "report"):
            ended = call(swapped(world.line(name, scratch / name), world.at("set"), forged))
            refused = ended.code == 1 and "not in train" in ended.text
            result.counts["forged sets refused"] += refused
            result.check(not refused, f"{name} takes a {column} of a test patient", ended)
    return result


# --- Hostile files ---


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pickled(world: World, scratch: Path, result: Findings) -> None:
    """Pickles in place of arrays and of checkpoints, of either format of torch: nothing runs."""
    mark, out = scratch / "mark", scratch / "out"
    attack, files = Attack(mark), [io.BytesIO() for _ in range(4)]
    array = np.array([attack], dtype=object)
    states = {"format": runs.CHECKPOINT_FORMAT, "chosen": attack, "best": attack, "step": attack}
    np.save(files[0], array)
    np.savez(files[1], samples=array, counts=array)
    torch.save(states, files[2])
    torch.save({"format": attack}, files[3], _use_new_zipfile_serialization=False)
    npy, npz, *saved = [file.getvalue() for file in files]

    def copy(name: str, origin: Path) -> Path:
        return shutil.copytree(origin, scratch / f"copy of {name}")

    patches, bump, made = (copy(name, world.at(name)) for name in ("patches", "bump", "set"))
    unfinished = {name: copy(f"an unfinished {name}", world.unfinished(name)) for name in RESUMED}
    (unfinished["set"] / "parts").mkdir(exist_ok=True)
    cases = [(unfinished["set"] / "parts/00000000.npz", npz, world.line("set", unfinished["set"]))]
    for name, kind in (("cls", "normal"), ("gan", "benign_mass"), ("set", "normal")):
        line = swapped(world.line(name, out), world.at("patches"), patches)
        cases.append((patches / f"patches/train/{kind}.npy", npy, line))
    line = swapped(world.line("cls50", out), world.at("set"), made)
    cases.append((made / "combined.npy", npy, line))
    for content in (*saved, npz, pickle.dumps(attack)):
        line = swapped(world.line("set", out), world.at("bump"), bump)
        cases.append((bump / "checkpoint.pt", content, line))
        for name in ("cls", "gan"):
            folder = unfinished[name]
            cases.append((folder / "checkpoint.pt", content, world.line(name, folder)))
        weights = scratch / "weights.pt"
        cases.append((weights, content, [*world.line("cls", out), "--weights", weights]))
    for file, content, line in cases:
        kept = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        ended = call(line)
        result.counts["pickles refused"] += ended.code == 1
        wrong = mark.exists() and "code was run"
        wrong = wrong or fault(ended, file.name) or (not ended.code and "taken")
        result.check(wrong, f"{line[0]} with a pickle as {file}", ended)
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
        shutil.rmtree(out, ignore_errors=True)


def escaping(world: World, scratch: Path, result: Findings) -> None:
    """Paths that lead out of the folder and names that are no text: nothing else is touched."""
    inner, out = scratch / "a/b", scratch / "out"
    inner.mkdir(parents=True)
    odd = [inner / "...dcm", inner / os.fsdecode(b"\xff\xfe odd.dcm")]
    for path in (scratch / "image.dcm", *odd):
        shutil.copy(world.manifest.with_name(f"-xL{PLACE}.dcm"), path)
    row = (f"../../{inner.name}/../image.dcm", f"../../{EVIL}", "L", "CC", "", "normal", *[""] * 4)
    (scratch / inner.name).mkdir()
    files.write_table(inner / "m.csv", sources.MANIFEST_COLUMNS, [row])

    def state() -> dict[Path, int]:
        found = (path for path in scratch.rglob("*") if out not in (path, *path.parents))
        return {path: path.stat().st_mtime_ns for path in found}

    before = state()
    few = ["--preset", "tiny", "--count=train/normal=4", "--out", out / "patches"]
    images = world.reinsert([inner / "m.csv", *odd], out / "images")
    for line in (["prepare", inner / "m.csv", *few], images):
        ended = call(line)
        result.counts["escapes tried"] += 1
        wrong = ended.code or (state() != before and "files outside have changed")
        result.check(wrong, f"{line[0]} with paths that lead out", ended)
    folder = world.at("images")
    for image in json.loads((folder / "annotations.json").read_bytes())["images"]:
        result.counts["odd names written"] += 1
        result.check(not (folder / image["file_name"]).is_file(), f"{image['file_name']!r}: absent")


def hostile(world: World, scratch: Path) -> Findings:
    """Nothing that is loaded runs, nothing leads out, every name works."""
    result = Findings()
    for part in (pickled, escaping):
        (scratch / part.__name__).mkdir()
        part(world, scratch / part.__name__, result)
    return result


# --- Bad files ---


def forged(raw: bytes, at: int, form: str, number: int) -> bytes:
    """With a number, cut to its bytes, at a place."""
    size = struct.calcsize(form)
    return raw[:at] + struct.pack(form, number & (256**size - 1)) + raw[at + size :]


def scrambled(raw: bytes, rng: random.Random) -> bytes:
    """Cut, with bytes flipped, doubled, zeroed, taken out, or with a forged number."""
    kind, head = rng.randrange(7), min(len(raw), 900)
    at = rng.randrange(len(raw) + 1) if rng.random() < 0.5 else rng.randrange(head + 1)
    size = rng.randrange(1, 1 << rng.randrange(1, 12))
    before, taken, after = raw[:at], raw[at : at + size], raw[at + size :]
    if kind == 1:
        flipped = bytearray(raw)
        for _ in range(rng.randrange(1, 12)):
            value = rng.randrange(256)
            flipped[rng.randrange(head if rng.random() < 0.7 else len(raw))] = value
        return bytes(flipped)
    if kind == 5:
        number = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF))
        return forged(raw, at, rng.choice(("<I", ">I", "<H", ">H")), number)
    if kind == 6:
        numbers = [match.span() for match in re.finditer(rb"\d+", raw[:20_000])] or [(0, 0)]
        first, last = rng.choice(numbers)
        odd = rng.choice((b"-1", b"0", b"9" * 30, b"1e999", b"nan", b"1_0", b"\xff"))
        return raw[:first] + odd + raw[last:]
    middle = {0: b"", 2: taken + taken, 3: bytes(len(taken)), 4: b""}[kind]
    return before + middle + (after if kind else b"")


VALUES_OF_JSON = [None, True, -1, 0, 10**30, 1e300, "", "x" * 1000, EVIL]
VALUES_OF_JSON += [[], {}, [[]], {"": 0}, "\udcff"]


OPTIMISERS = {"opt_G", "opt_D", "optimizer"}  # of a checkpoint: what they hold is trusted


def changed(value: object, rng: random.Random) -> object:
    """JSON or a checkpoint with one value replaced or taken out, at any depth."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        copy = value.copy()
        keys = range(len(copy)) if isinstance(copy, list) else copy.keys() - OPTIMISERS
        at = rng.choice(sorted(keys, key=str))
        if rng.random() < 0.2:
            del copy[at]
        else:
            copy[at] = changed(copy[at], rng)
        return copy
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        odd = value.double(), value.bool(), value.new_empty(0), value[None], value * float("nan")
        return rng.choice((*odd, torch.zeros(3), torch.tensor(1)))
    return rng.choice(VALUES_OF_JSON)


@functools.cache
def breast(seed: int, wide: bool) -> np.ndarray:
    """A small image of a breast, 8 or 12 bits."""
    shade = phantom.render(0, seed, "L", "CC")[0][::2, ::2]
    top, dtype = (4095, np.uint16) if wide else (255, np.uint8)
    return np.rint(np.clip(shade, 0, 1) * top).astype(dtype)


def small_dicom(syntax: str, wide: bool = True) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(phantom.dicom(0, 0, "L", "CC", breast(0, True) / 4095, 0.3)))
    ds.update(few())
    pixels = breast(0, wide)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = (16, 12, 11) if wide else (8, 8, 7)
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds["PixelData"].value, ds["PixelData"].VR = pixels.tobytes(), "OW" if wide else "OB"
    ds.Rows, ds.Columns = pixels.shape
    if syntax == uid.JPEGBaseline8Bit:
        jpeg = io.BytesIO()
        Image.fromarray(pixels).save(jpeg, format="JPEG")
        ds.PixelData, ds.file_meta.TransferSyntaxUID = encapsulate([jpeg.getvalue()]), syntax
        ds["PixelData"].VR = "OB"
    elif syntax == uid.JPEG2000:
        ds.compress(syntax, j2k_cr=[5], generate_instance_uid=False)
    elif syntax == uid.JPEGLSNearLossless:
        ds.compress(syntax, jls_error=2, generate_instance_uid=False)
    elif uid.UID(syntax).is_compressed:
        ds.compress(syntax, generate_instance_uid=False)
    else:
        ds.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True, implicit_vr=uid.UID(syntax).is_implicit_VR)
    return file.getvalue()


@functools.cache
def dicom_bases() -> list[bytes]:
    """Every syntax, plain and with a VOI LUT, and pydicom's own files passed off as mammograms."""
    syntaxes = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.JPEG2000Lossless]
    syntaxes += [uid.JPEG2000, uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.RLELossless]
    bases = [small_dicom(syntax, wide) for syntax in syntaxes for wide in (True, False)]
    bases.append(small_dicom(uid.JPEGBaseline8Bit, False))
    for path in sorted(Path(pydicom.data.__file__).parent.rglob("*")):
        raw = path.read_bytes() if path.is_file() and path.stat().st_size < 300_000 else b""
        if raw[128:132] == b"DICM":
            bases.append(raw)
            with contextlib.suppress(Exception):  # what cannot be written again stays as it is
                ds, file = pydicom.dcmread(io.BytesIO(raw)), io.BytesIO()
                ds.Modality, ds.BodyPartExamined = "MG", "BREAST"
                ds.PhotometricInterpretation = "MONOCHROME2"
                ds.save_as(file)
                bases[-1] = file.getvalue()
    return bases


def bad_dicom(rng: random.Random) -> bytes:
    """One of the bases, damaged by bytes or by elements, once or twice."""
    own = dicom_bases()[:15]
    raw = rng.choice(own if rng.random() < 0.6 else dicom_bases()[15:])
    for _ in range(rng.randrange(1, 3)):
        kind = rng.randrange(7)
        if kind == 0:  # a length: of an element with explicit VR, or of an item
            element = rb"(?s)..[\0-\x7f]\0(?:[A-Z]{2}|\0\xe0)"
            places = [match.end() for match in re.finditer(element, raw[132:])] or [0]
            at, form = 132 + rng.choice(places), rng.choice(("<H", "<I", "<I"))
            number = rng.choice((0, 1, 7, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(raw)))
            raw = forged(raw, at, form, number)
        elif kind == 1:  # rows, columns, samples, bits
            numbers = b"\x10\0", b"\x11\0", b"\2\0", b"\0\1", b"\1\1", b"\2\1", b"\3\1"
            at = raw.find(b"\x28\0" + rng.choice(numbers)) + 8
            if at > 8:
                sizes = (0, 1, 2, 8, 12, 15, 16, 17, 32, 40, 3000, 10_500, 65_535)
                raw = forged(raw, at, "<H", rng.choice(sizes))
        elif kind == 2:  # another transfer syntax than the data have
            known = [*mammogram.DECODERS, *mammogram.NATIVE]
            known += [uid.DeflatedExplicitVRLittleEndian, "1.2.3", "", "x" * 64]
            for syntax in sorted(map(str, known), key=len, reverse=True):
                if syntax and syntax.encode() in raw[:600]:
                    new = str(rng.choice(known)).encode()[: len(syntax)].ljust(len(syntax), b"\0")
                    raw = raw.replace(syntax.encode(), new, 1)
                    break
        elif kind == 3:  # a sequence in a sequence in a sequence, ended or not
            at, depth = raw.find(b"\x54\0\x20\2"), rng.choice((3, 50, 500, 5000))
            begin = b"\x54\0\x20\2SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff"
            close = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
            raw = raw[:at] + begin * depth + close * rng.choice((depth, depth // 2)) + raw[at:]
        elif kind == 4:  # an attribute of another type, or with an odd value
            with contextlib.suppress(Exception), pydicom.config.disable_value_validation():
                ds, file = pydicom.dcmread(io.BytesIO(raw), force=True), io.BytesIO()
                values = b"", b"\xff" * 9, b"1\\2\\3", b"nan", b"1e999", b"-0", WORD.encode() * 900
                value = rng.choice(values)
                ds.add_new(rng.choice(mammogram.KEYWORDS), rng.choice(("UN", "OB")), value)
                ds.save_as(file)
                vr = rng.choice((b"LO", b"DS", b"IS", b"UI", b"CS", b"US", b"FD", b"SQ", b"UN"))
                old = b"UN\0\0" + struct.pack("<I", len(value))
                new = vr + struct.pack("<HI", len(value), 0)
                raw = file.getvalue().replace(old, new, 1)
        else:
            raw = scrambled(raw, rng)
    return raw


@functools.cache
def raster_bases() -> list[bytes]:
    bases, plain = [], [(form, {}) for form in ("PNG", "PPM", "TIFF")]
    packed = [("TIFF", {"compression": c}) for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    for form, options in (*plain, *packed, ("JPEG", {}), ("JPEG", {"progressive": True})):
        for wide in (False, True):
            file = io.BytesIO()
            with contextlib.suppress(OSError):
                Image.fromarray(breast(1, wide)).save(file, format=form, **options)
                bases.append(file.getvalue())
    return bases


def bad_raster(rng: random.Random) -> bytes:
    raw = rng.choice(raster_bases())
    if rng.random() < 0.3:  # another size in the header, up to 110 megapixels
        rows, columns = (rng.choice((0, 1, 100, 5000, 10_500, 40_000, 65_535)) for _ in range(2))
        if raw[:2] == b"\xff\xd8":
            at = max(raw.find(b"\xff\xc0"), raw.find(b"\xff\xc2")) + 5
            raw = forged(forged(raw, at, ">H", rows), at + 2, ">H", columns)
        elif raw[1:4] == b"PNG":
            head = b"IHDR" + struct.pack(">2I", columns, rows) + raw[24:29]
            raw = raw[:12] + head + struct.pack(">I", zlib.crc32(head)) + raw[33:]
        elif raw[:2] == b"P5":
            raw = b"P5\n%d %d\n" % (columns, rows) + raw.split(b"\n", 2)[2]
        else:
            order = "<" if raw[:2] == b"II" else ">"
            for tag, size in ((256, columns), (257, rows)):
                at = raw.find(struct.pack(f"{order}2H", tag, 4))
                raw = forged(raw, at + 8, f"{order}I", size) if at >= 0 else raw
    return scrambled(raw, rng) if rng.random() < 0.7 else raw


IMAGES_AT_ONCE = 20  # mutated images in one command; each must come out as a row of its own


def image_commands(world: World, folder: Path, paths: list[Path], rng: random.Random) -> list:
    """`prepare` on the files and a sound one; now and then `synthesize --image`."""
    if rng.random() < 0.15:
        return world.reinsert(paths, folder / "out")
    sound = folder / "sound.png"
    Image.fromarray(breast(2, False)).save(sound)
    boxed, rows = rng.random() < 0.2, []
    for file in (*paths, sound):
        what = ("mass", "malignant", 2, 2, 4, 4) if boxed else ("", "normal", *[""] * 4)
        rows.append((file, "one", "L", "CC", *what, "train"))
    files.write_table(folder / "m.csv", (*sources.MANIFEST_COLUMNS, "split"), rows)
    line = ["prepare", folder / "m.csv", "--preset", "tiny", "--spacing-mm", 0, "--workers", 1]
    line += ["--count=train/normal=4", "--count=train/malignant_mass=0"]
    return [*line, *(["--normals", "annotated"] if boxed else []), "--out", folder / "out"]


def image_outcomes(paths: list[Path], folder: Path, ended: Ended, outcomes: Counter) -> str:
    if (folder / "out" / "excluded.csv").exists() and not ended.code:
        rows = [r["image_path"] for r in table(folder / "out" / "excluded.csv")]
        used = {r["image_path"] for r in table(folder / "out" / "manifest.csv")}
        outcomes["excluded"] += len(rows)
        outcomes["used"] += len(used) - 1
        if sorted([*rows, *used]) != sorted(map(str, [*paths, folder / "sound.png"])):
            return "not each image is a row of excluded.csv or manifest.csv"
        text = (folder / "out" / "excluded.csv").read_text()
        if any(s in text for s in SECRETS):
            return "a reason holds an identifier"
    else:
        outcomes["used" if not ended.code else "one message"] += len(paths)
    return ""


def images(make: Callable, world: World, scratch: Path, names: list[str], outcomes: Counter) -> str:
    """Run one command on the images of so many seeds; gives its fault."""
    folder = scratch / "case"
    folder.mkdir()
    paths = [folder / f"{i}" for i in range(len(names))]
    for file, name in zip(paths, names, strict=True):
        file.write_bytes(make(random.Random(name)))
    line = image_commands(world, folder, paths, random.Random(names[0]))
    ended = call(line, CLOCK_SECONDS, guard_memory)
    wrong = fault(ended, folder) or image_outcomes(paths, folder, ended, outcomes)
    if wrong and len(names) == 1:
        print(f"{names[0]} {line[0]}: {ended.text.strip()[-1500:]}")
    shutil.rmtree(folder)
    return wrong


def spoil(folder: Path, rng: random.Random, suffixes: tuple[str, ...]) -> None:
    """Damage one file: its bytes, its values, its name, or swap it with another."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in suffixes)
    file, kind = rng.choice(files), rng.randrange(10)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        other = rng.choice(files)
        raw = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(raw)
    elif kind == 2:
        file.unlink()
        file.mkdir() if rng.random() < 0.5 else file.symlink_to("nowhere")
    elif file.suffix == ".json" and kind < 9:
        file.write_text(json.dumps(changed(json.loads(file.read_text()), rng)))
    elif file.suffix == ".jsonl" and kind < 7:
        lines = file.read_text().splitlines() or ["{}"]
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(changed(json.loads(lines[at]), rng))
        file.write_text("\n".join(lines))
    elif file.suffix == ".csv" and kind < 7:
        file.write_bytes(bad_table(file.read_bytes(), rng))
    elif file.suffix == ".npy" and kind < 5:
        array = np.load(file)
        types = array.astype(np.float64), array.astype("S2")
        np.save(file, rng.choice((array[:-1], array[..., :-1], array[0], *types)))
    elif file.suffix == ".pt" and kind < 7:
        with contextlib.suppress(UnicodeError):  # then the file ends early
            torch.save(changed(torch.load(file, weights_only=True), rng), file)
    else:
        file.write_bytes(scrambled(file.read_bytes(), rng))


def bad_table(raw: bytes, rng: random.Random) -> bytes:
    """A CSV with other columns, types, encodings, line ends, or thousands of columns."""
    rows = list(csv.reader(io.StringIO(raw.decode())))
    kind, at = rng.randrange(14), rng.randrange(len(rows))
    column = rng.randrange(len(rows[0]))
    odd = ["", "nan", "inf", "-1", "1e308", "9" * 400, "=1+1", EVIL, "x" * 200_000, "../../.."]
    odd += ["/dev/zero", "a\0b", "\x1b[2J", "é", "0x10", "L", "train", "normal", "."]
    if kind == 0:
        rows = [row[:column] + row[column + 1 :] for row in rows]
    elif kind == 1:
        rows = [[*row, row[column]] for row in rows]
    elif kind == 2:
        rows = [[*row, *map(str, range(rng.choice((3000, 9000))))] for row in rows[:5]]
    elif kind == 3:
        rows[0][column] = rows[0][column][::-1]
    elif kind == 4:
        rows[at] = rows[at][:column]
    elif kind == 5:
        rows = rows[:1]
    elif kind < 11:
        rows[at][column:] = [rng.choice(odd), *rows[at][column + 1 :]]
    text = io.StringIO()
    csv.writer(text, lineterminator=rng.choice(("\n", "\r\n", "\n\n"))).writerows(rows)
    if kind == 11:
        codec = rng.choice(("utf-16", "utf-16-le", "utf-32", "cp037", "utf-7"))
        return text.getvalue().encode(codec, "replace")
    if kind == 12:
        return text.getvalue().replace(",", rng.choice((";", "\t", '"', "\0"))).encode()
    return scrambled(text.getvalue().encode(), rng) if kind == 13 else text.getvalue().encode()


def bad_manifest(world: World, folder: Path, rng: random.Random) -> list:
    rows = []
    for number, name in enumerate(("a.png", "b.png", "c.png", "d.png")):
        Image.fromarray(breast(number, False)).save(folder / name)
        what = ("mass", "malignant", 60, 30, 90, 60) if number % 2 else ("", "normal", *[""] * 4)
        rows.append([name, f"p{number}", "L", "CC", *what, "", 0.3, 0.3, "train", ""])
    path = folder / "m.csv"
    files.write_table(path, (*sources.MANIFEST_COLUMNS, *sources.MANIFEST_OPTIONAL), rows)
    for _ in range(rng.randrange(1, 3)):
        with contextlib.suppress(UnicodeDecodeError, csv.Error, IndexError, ValueError):
            path.write_bytes(bad_table(path.read_bytes(), rng))
    if rng.random() < 0.1:
        return world.reinsert([path], folder / "out")
    counts = ["--count=train/normal=2", "--count=train/malignant_mass=2"]
    return ["prepare", path, "--preset", "tiny", "--workers", 1, *counts, "--out", folder / "out"]


SHORT = {  # enough to read what was damaged
    "gan": ["--iters-base", 1, "--iters-fade", 0, "--iters-final", 1],
    "cls": ["--samples", 8],
    "cls50": ["--samples", 8],
}


def copy_of(origin: Path, folder: Path) -> Path:
    return shutil.copytree(origin, folder / "copy", ignore=shutil.ignore_patterns("*.png"))


def bad_patches(world: World, folder: Path, rng: random.Random) -> list:
    copy = copy_of(world.at("patches"), folder)
    spoil(copy, rng, (".json", ".csv", ".npy"))
    name = rng.choices(("set", "cls", "cls50", "gan", "report"), (60, 20, 5, 12, 3))[0]
    line = world.line(name, folder / "out") + SHORT.get(name, [])
    return swapped(line, world.at("patches"), copy)


def bad_run(world: World, folder: Path, rng: random.Random) -> list:
    """A generator, a classifier, or an unfinished folder that is gone on with."""
    weights = {"bump": 35, "gan": 15, "cls": 15, "set": 15, "patches": 15, "report": 5}
    name = rng.choices(list(weights), weights.values())[0]
    origin = {"bump": world.at("bump"), "report": world.at("cls")}.get(name)
    origin = origin or world.unfinished(name)
    copy = shutil.copytree(origin, folder / "copy")
    spoil(copy, rng, (".json", ".jsonl", ".pt", ".npz", ".npy"))
    if name in ("bump", "report"):
        return swapped(world.line("set" if name == "bump" else name, folder / "out"), origin, copy)
    return world.line(name, copy)


def bad_set(world: World, folder: Path, rng: random.Random) -> list:
    copy = copy_of(world.at("set"), folder)
    spoil(copy, rng, (".json", ".csv", ".npy"))
    name = rng.choices(("cls50", "report"), (95, 5))[0]
    line = world.line(name, folder / "out") + SHORT.get(name, [])
    return swapped(line, world.at("set"), copy)


def mutate(kind: str, world: World, numbers: range, seed: int, scratch: Path) -> Findings:
    """So many damaged inputs, each from (seed, kind, number): success, a row, or one message."""
    result, outcomes = Findings(), Counter()
    if kind in BAD_IMAGES:
        make = partial(images, BAD_IMAGES[kind], world, scratch)
        names = [f"{seed} {kind} {number}" for number in numbers]
        for some in (names[i : i + IMAGES_AT_ONCE] for i in range(0, len(names), IMAGES_AT_ONCE)):
            trial = Counter()
            if make(some, trial):
                trial = Counter()
                for name in some:  # which of them it is
                    result.check(make([name], trial), name)
            outcomes += trial
    else:
        for number in numbers:
            folder = scratch / "case"
            folder.mkdir()
            name = f"{seed} {kind} {number}"
            line = BAD_FOLDERS[kind](world, folder, random.Random(name))
            ended = call(line, CLOCK_SECONDS, guard_memory)
            outcomes["one message" if ended.code else "used"] += 1
            result.check(fault(ended, world.root), f"{name} {line[0]}", ended)
            shutil.rmtree(folder)
    result.counts["mutated"] = len(numbers)
    result.counts.update(outcomes)
    return result


BAD_IMAGES = {"dicom": bad_dicom, "raster": bad_raster}
BAD_FOLDERS = {"manifest": bad_manifest, "patches": bad_patches, "run": bad_run, "set": bad_set}


def bombs(world: World, scratch: Path) -> Findings:
    """Small files that are, or only claim to be, 110 megapixels: read or left out, in time."""
    side, raw, result = 10_500, {}, Findings()

    def save(name: str, save_as: Callable, **options: object) -> None:
        file = io.BytesIO()
        save_as(file, **options)
        raw[name] = file.getvalue()

    flat = Image.fromarray(np.zeros((side, side), np.uint8))
    deep = Image.fromarray(np.zeros((side, side), np.uint16))
    save("png", deep.save, format="PNG", compress_level=1)
    save("tiff", deep.save, format="TIFF", compression="tiff_adobe_deflate")
    save("jpeg", flat.save, format="JPEG")
    save("progressive jpeg", flat.save, format="JPEG", progressive=True)
    save("small", Image.fromarray(breast(1, False)).save, format="JPEG")
    small = raw.pop("small")
    at = small.find(b"\xff\xc0") + 5
    small = forged(forged(small, at, ">H", side), at + 2, ">H", side)
    noise = np.random.default_rng(0).integers(1, 255, 900_000, dtype=np.uint8).tobytes()
    for name, padding in (("", b""), (", padded", bytes(900_000)), (", noise", noise)):
        raw[f"jpeg forged{name}"] = small[:-2] + padding + b"\xff\xd9"
    for syntax in (uid.JPEGBaseline8Bit, uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless):
        ds = pydicom.dcmread(io.BytesIO(small_dicom(syntax, syntax != uid.JPEGBaseline8Bit)))
        ds.Rows = ds.Columns = side
        if syntax == uid.JPEGBaseline8Bit:
            ds.PixelData = encapsulate([raw["jpeg"]])
        elif syntax == uid.JPEG2000Lossless:  # its encoder is slow: only the size is forged
            at = ds.PixelData.find(b"\xff\x4f\xff\x51") + 8
            ds.PixelData = forged(forged(ds.PixelData, at, ">I", side), at + 4, ">I", side)
        else:
            ds.compress(syntax, np.asarray(deep), generate_instance_uid=False)
        save(f"dicom {syntax.name}", ds.save_as)
    for name, content in raw.items():
        outcomes = Counter()
        wrong = images(lambda _, c=content: c, world, scratch, [f"bomb {name}"], outcomes)
        result.check(wrong, f"bomb {name} of {len(content)} bytes")
        result.counts += outcomes + Counter(mutated=1)
    return result


# --- All of it ---

MUTATED = (*BAD_IMAGES, *BAD_FOLDERS)
PARTS = ("private", "parted", "hostile", "starved", "killed", "stopped", "bombs")


def run_part(name: str, world: World, scratch: Path, options: dict) -> Findings:
    rng = random.Random(f"{options['seed']} {name}")
    if name in MUTATED:
        numbers = range(options["first"], options["first"] + options["mutations"])
        return mutate(name, world, numbers, options["seed"], scratch)
    if name == "killed":
        return killed(world, options["kills"], rng, scratch)
    if name == "stopped":
        return stopped(world, options["stops"], rng, scratch)
    if name == "starved":
        return starved(world, scratch, options["starve"])
    return globals()[name](world, scratch)


@click.command(help=__doc__)
@click.option("--kills", default=50, show_default=True, help="Of each command.")
@click.option("--stops", default=10, show_default=True, help="SIGINT and SIGTERM, of each command.")
@click.option("--mutations", default=2000, show_default=True, help="Of each kind of input.")
@click.option("--seed", default=0, show_default=True)
@click.option("--first", default=0, help="Number of the first mutation: to try one again.")
@click.option("--starve", multiple=True, type=click.Choice(COMMANDS), default=COMMANDS)
@click.option("--only", multiple=True, type=click.Choice([*PARTS, *MUTATED]))
def main(only: tuple[str, ...], **options: object) -> None:
    total, found = Counter(killed=0, resumed=0, mutated=0, leaked=0), 0
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        world = World(Path(folder)).make()
        for name in only or (*PARTS, *MUTATED):
            scratch, began = world.root / "scratch", time.monotonic()
            scratch.mkdir()
            PEAK.update(seconds=0.0, MiB=0)
            result = run_part(name, world, scratch, options)
            shutil.rmtree(scratch)
            total, found = total + result.counts, found + result.found
            line = [f"{what} {n}" for what, n in result.counts.items()]
            line += [f"at most {PEAK['seconds']:.1f} s and {PEAK['MiB']} MiB a command"]
            line += [f"findings {result.found}", f"{time.monotonic() - began:.0f} s"]
            print(f"{name}: {', '.join(line)}", flush=True)
    counts = (f"{what}: {total[what]}" for what in ("killed", "resumed", "mutated", "leaked"))
    print(f"seed {options['seed']}; {', '.join(counts)}; findings: {found}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
