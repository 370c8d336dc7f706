"""OMI-DB (OPTIMAM), the paper's data (P1)."""

import re
from collections.abc import Iterator
from pathlib import Path

from support.files import numbers, read_json
from support.mammogram import WORDS, NotUsable, read_header
from support.runs import progress
from support.sources import common

# The events of an NBSS episode: those that look at tissue decide before the others.
EVENTS = ("SURGERY", "BIOPSYWIDE", "BIOPSYFINE", "ASSESSMENT", "CLINICAL", "SCREENING")
# Opinions that decide, as code or in words: overall (O), histology (H), biopsy (B), cytology (C).
MALIGNANT = ("OM", "H5", "B5", "C5", "Malignant", "O Malignant", "Hist malignant", "Cyt malig")
BENIGN = ("OB", "H2", "B2", "C2", "Benign", "O Benign", "Histol benign", "Cyt benign")
OPINIONS = dict.fromkeys(MALIGNANT, "malignant") | dict.fromkeys(BENIGN, "benign")
FLAGS = {
    "Mass": "mass",
    "SuspiciousCalcifications": "calcification",
    "WithCalcification": "calcification",
    "ArchitecturalDistortion": "distortion",
    "FocalAsymmetry": "asymmetry",
}
UID = re.compile(r"\d+(\.\d+)+")


def read_omidb(root: Path, traps: common.Traps) -> Iterator[common.Finding]:
    """OMI-DB, the OPTIMAM Mammography Image Database.

    Access: "OMI-DB, sharing" at Royal Surrey NHS Foundation Trust, on application.
    Licence: the sharing agreement signed with it; research only, not to be passed on.

    `data/<client>/imagedb_<client>.json` lists studies, series, images and marks (boxes, no
    pathology), `nbss_<client>.json` the opinions of each episode by event, side and lesion number.
    Not guessed: an image without marks is normal only when all its client's episodes are.
    """
    clients = sorted(p for p in root.glob("data/*/") if p.name[:4] in ("demd", "optm"))
    if not clients:
        raise ValueError(f"{root}: found no client in data; expected OMI-DB's data and images")
    with progress(len(clients), "OMI-DB clients") as advance:
        for client in clients:
            with common.sparing(traps):
                yield from _client(client, root / "images" / client.name, traps)
            advance()


def _client(client: Path, images: Path, traps: common.Traps) -> Iterator[common.Finding]:
    names = (f"{kind}_{client.name}.json" for kind in ("imagedb", "nbss"))
    imagedb, nbss = (read_json(common.named(client.iterdir(), client, name)) for name in names)
    episodes = {key: value for key, value in nbss.items() if isinstance(value, dict)}
    normal = bool(episodes) and all(map(_normal, episodes.values()))
    for study_id, study in _level(imagedb, "STUDIES").items():
        episode = _episode(_level(study), episodes, traps)
        for series_id, series in _level(study).items():
            for image_id, marks in _level(series).items():
                if not all(UID.fullmatch(uid) for uid in (study_id, series_id, image_id)):
                    continue  # attributes of a study or series
                path = images / study_id / f"{image_id}.dcm"
                if not path.is_file():
                    traps[common.ABSENT, str(path)] = 1
                    continue
                side, view = _side_and_view(path)
                if side not in ("L", "R"):
                    traps["Images whose header is damaged or tells no side, left out"] += 1
                    continue
                image, rows = common.Finding(str(path), client.name, side, view), []
                for mark in filter(None, map(_level, _level(marks).values())):
                    rows += _mark(mark, image, episode, traps)
                pathology = "normal" if normal else _pathology(episode, side, "", traps)
                yield from rows or [common.unmarked(image, pathology, traps)]


def _side_and_view(path: Path) -> tuple[str, str]:
    """By the header; empty for a damaged file, and other text in place of a view stays there."""
    try:
        with open(path, "rb") as file:
            ds = read_header(path, file, ("ImageLaterality", "Laterality", "ViewPosition"))
    except (NotUsable, OSError):
        return "", ""
    side = str(ds.get("ImageLaterality") or ds.get("Laterality") or "").strip()
    view = str(ds.get("ViewPosition") or "").strip()
    return side, view if view in WORDS["ViewPosition"] else ""


def _mark(mark: dict, image: common.Finding, episode: dict, traps: common.Traps) -> list:
    """One mark -> a row for each of its types; a mass with calcification is two rows (Q24)."""
    box = None
    try:
        x1, y1, x2, y2 = numbers(mark, ("X1", "Y1", "X2", "Y2"))
        traps["Boxes with corners in another order, sorted"] += x1 > x2 or y1 > y2
        box = min(y1, y2), min(x1, x2), max(y1, y2), max(x1, x2)
    except ValueError:
        traps["Marks without four corners: only their image is labelled"] += 1
    linked = re.findall(r"\d+", str(mark.get("LinkedNBSSLesionNumber") or "")) or ["0"]
    verdicts = {_pathology(episode, image.laterality, str(int(n)), traps) for n in linked}
    # Several linked lesions: one malignant decides; benign only when all of them are.
    pathology = "malignant" if "malignant" in verdicts else min(verdicts)
    traps["Marks whose linked lesion has no deciding opinion: pathology unknown"] += not pathology
    kinds = {kind for flag, kind in FLAGS.items() if mark.get(flag)}
    return common.typed(image, kinds, pathology, box, traps)


def _level(node: object, *keys: str) -> dict:
    """A level of OMI-DB's JSON; empty where the file holds null or "" in its place."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _leaves(node: dict) -> Iterator[tuple[str, str]]:
    """Names (lower case) and values at any level of an episode."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield key.lower(), str(value)


def _normal(episode: dict) -> bool:
    """No interval cancer, surgery, benign or malignant opinion, and no examination without one."""
    events = {name: _level(episode, name) for name in EVENTS if episode.get(name) is not None}
    examined = [event for name, event in events.items() if name != "SCREENING"]
    return (
        bool(events)
        and episode.get("EpisodeType") not in ("CI", "Interval case")
        and not episode.get("INTERVALCANCER")
        and "SURGERY" not in events
        and all(event.get("left_opinion") or event.get("right_opinion") for event in examined)
        and not any(k.endswith("opinion") and v in OPINIONS for k, v in _leaves(episode))
    )


def _episode(study: dict, episodes: dict[str, dict], traps: common.Traps) -> dict:
    """The study's episode, by its id or else by an event on the day of the study."""
    if (key := str(study.get("EpisodeID"))) in episodes:
        return episodes[key]
    day = str(study.get("StudyDate") or "").replace("-", "")
    for episode in episodes.values():
        dates = (v for k, v in _leaves(episode) if k in ("dateperformed", "datetaken"))
        if day and day in (date.replace("-", "") for date in dates):
            traps["Studies whose episode id is unknown to NBSS, linked by date"] += 1
            return episode
    traps["Studies without an NBSS episode: their marks have no pathology"] += 1
    return {}


def _pathology(episode: dict, side: str, lesion: str, traps: common.Traps) -> str:
    """What NBSS says of a side's lesion: the first event that decides; "" when none does.

    An event's opinion of the whole side stands in for a lesion's own only where it cannot mean
    another lesion: it is benign, the side has a single lesion, or the side is asked for (`lesion`
    empty).
    """
    single = len(_level(episode, "LESION", side)) <= 1
    for name in EVENTS:
        event = _level(episode, name)
        own = _level(event, side, lesion).get("Opinion")
        if verdict := OPINIONS.get(own):
            return verdict
        verdict = OPINIONS.get(event.get("left_opinion" if side == "L" else "right_opinion"))
        if verdict == "malignant" and lesion and not single:
            traps["Malignant opinions of a side with several lesions, used for none of them"] += 1
        elif verdict:
            return verdict
    return ""
