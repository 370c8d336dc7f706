"""The whole evaluation: table1.csv, metrics.json, figures, and report.html from its template."""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
import torch

import evaluate as results
from data import CLASSES
from evaluate import BASELINE, MAIN, STATISTICS
from support import figures, files, patchset, provenance, runs
from support.controls import control_of, lesion_or_image, readings, thresholds
from support.sources import SPLITS
from support.subgroups import FACTS, patch_facts, subgroups

COLUMNS = (  # of table1.csv
    *("regime", "proportion", "seeds", "patients", "patches", "auc", "low", "high"),
    *("delta", "delta_low", "delta_high", "p_delong", "p_clustered", "detectable"),
)
# of rows.json, which docs/results/ keeps
RESULTS = {*COLUMNS, "folds", "train_malignant"} - {"proportion", "patches", "p_delong"}
# of a patch set: what its folds have each for themselves
OWN = (*("name", "fold", "fingerprint", "held"), *("patients", "normals_with_cancer", "notes"))
OWN += ("train_malignant",)
PICTURES = ("difference", "roc", "reliability", "figure1", "nearest", "gan")
PICTURES += ("figure4", "figure5", "figure6")


# --- The whole evaluation ---


def evaluate(
    patch_set: Path,
    baseline: Path,
    augmented: Sequence[Path],
    synthetic: Sequence[Path],
    out: Path,
    device: torch.device | str = "cpu",
    seed: int = 0,
    test: Path | None = None,
) -> list[dict]:
    """Table 1 with statistics that hold, controls, Figures 1, 4, 5, 6, and report.html.

    test: another patch set, whose test split is scored as well (external test). Returns the rows of
    table1.csv with what was concluded. Raises ValueError: runs or sets of another patch set,
    unfinished runs, fewer than two test patients a class, a `test` that does not fit or shares
    images or patients.
    """
    patch_set, out, device = Path(patch_set), Path(out), torch.device(device)
    config = patchset.patch_config(patch_set)
    regimes = results.open_regimes(baseline, augmented, config["fingerprint"])
    sets = [patchset.open_synthetic(path) for path in synthetic]
    for syn in sets:
        provenance.check_synthetic(syn, patch_set)
    claimed = {"data": config["fingerprint"], "regimes": [[r.name, *r.hashes] for r in regimes]}
    claimed |= {"synthetic": [s.fingerprint for s in sets], "seed": seed}
    other = provenance.check_external(Path(test), patch_set) if test else None
    if test:
        provenance.check_generators(Path(test), regimes, sets)
        claimed["test"] = other["fingerprint"]
    stages = sum(len(r.runs) for r in regimes) * (2 if test else 1) + len(sets) + 1
    claim = runs.claim_folder(out, "evaluate", claimed)
    with claim, runs.progress(stages, "evaluate") as advance:
        splits = {s: patchset.Patches.open(patch_set, s) for s in SPLITS}
        who = {split: patches.column("patient_id") for split, patches in splits.items()}
        images, scored = splits["test"].column("image_uid"), (device, advance)
        kind, patients, scores, facts = _score(regimes, patch_set, out / "scores.csv", *scored)
        healthy = patchset.Patches.open(patch_set, "val", "normal")
        limits = {r.name: np.c_[thresholds(results.score(r, healthy, device))] for r in regimes}
        metrics = claimed | {"data": {"name": patch_set.name, **config}}
        metrics["flow"] = patchset.flow(patch_set)
        metrics["conditions"] = conditions(kind, patients, scores, patch_set)
        if test:
            *given, _ = _score(regimes, Path(test), out / "scores-external.csv", *scored)
            tables = {"conditions": conditions(*given, test), "readings": readings(*given, limits)}
            metrics["external"] = {"name": Path(test).name, "data": other, **tables}
        metrics["lesion_or_image"] = {
            name: lesion_or_image(kind, patients, images, s) for name, s in scores.items()
        }

        features, metrics["controls"], nearest = results.pooled_features(regimes[0], device), [], []
        for k, syn in enumerate(sets):
            control, closest = control_of(syn, splits, features, device, seed)
            metrics["controls"].append(control)
            nearest += [(syn.path.name, closest, ("synthetic", "nearest"))] if closest else []
            _keep_pictures(sets, k, out)
            advance(1, f"{syn.path.name}: controls")
        if nearest:
            figures.save_figure(figures.patch_figure(nearest), out / "nearest.png")
        metrics["feature_space"] = figures_4_to_6(regimes, splits, sets, scores, device, seed, out)

        metrics["data"]["patients"] = {
            f"{split}/{name}": len(set(who[split][patches.kind == name]))
            for split, patches in splits.items()
            for name in patches.parts
        }
        ill = np.char.startswith(splits["train"].kind, "malignant")
        metrics["data"]["train_malignant"] = len(set(who["train"][ill]))
        metrics["runs"] = [
            {"regime": r.name, "proportion": r.proportion, "run": r.folder.name, "seeds": r.seeds}
            | {"weights": r.hashes, "config": r.config, "thresholds": limits[r.name][:, 0].tolist()}
            for r in regimes
        ]
        rows = _write(metrics, kind, patients, facts, scores, limits, out)
        advance(1, "report written")
    return rows


def _score(regimes, data: Path, path: Path, device, advance) -> tuple:
    """Class and patient of the test patches (N,), p(cancer) (K, N) of each regime, `patch_facts`.

    Also as a table: a row a patch, a column a training seed.
    """
    patches, told, scores = patchset.Patches.open(data, "test"), patch_facts(data, "test"), {}
    for regime in regimes:
        scores[regime.name] = results.score(regime, patches, device)
        advance(len(regime.runs), f"{regime.name} scored")
    names = [f"{regime.name} seed {seed}" for regime in regimes for seed in regime.seeds]
    found, facts = np.concatenate(list(scores.values())).tolist(), ("patch", "patient_id")
    rows = zip(*map(patches.column, facts), patches.kind, *told.values(), *found, strict=True)
    files.write_table(path, ("patch", "patient", "class", *told, *names), rows)
    return patches.kind, patches.column("patient_id"), scores, told


def conditions(kind, patients, scores, where, fold=None) -> dict[str, dict]:
    """The table of each condition (`condition_table`). Raises ValueError without the main one."""
    tested = {c: np.isin(kind, [*pos, *neg]) for c, (pos, neg) in results.CONDITIONS.items()}
    tables = {  # with one kind of lesion only, the whole test set is not shown again
        c: results.condition_table(kind, patients, scores, c, fold)
        for c, at in tested.items()
        if c == MAIN or (at != tested[MAIN]).any()
    }
    if not tables[MAIN]:
        names = [name for names in results.CONDITIONS[MAIN] for name in names]
        text = ", ".join(f"{name} {len(set(patients[kind == name]))}" for name in names)
        found = f"{where}: fewer than two test patients a class; found {text}"
        raise ValueError(f"{found}; prepare more, see --count")
    return tables


def _write(metrics: dict, kind, patients, facts, scores, limits, out, fold=None) -> list[dict]:
    """What evaluations and folds have alike, curves, tables and the report; the folder is whole
    then. Rows of table1.csv."""
    unit = "mm" if metrics["data"]["spacing_mm"] else "px"
    metrics["subgroups"] = subgroups(kind, patients, scores, facts, unit, fold)
    metrics["readings"] = readings(kind, patients, scores, limits, fold)
    told = {"train_malignant": metrics["data"]["train_malignant"]}
    rows = [
        row | told | {"proportion": run["proportion"], "title": title(run)}
        for row, run in zip(metrics["conditions"][MAIN]["rows"], metrics["runs"], strict=True)
    ]
    at = np.isin(kind, sum(results.CONDITIONS[MAIN], ()))
    y, fold = kind[at] != "normal", fold if fold is None else fold[at]
    curves = {name: results.mean_roc(y, s[:, at], fold) for name, s in scores.items()}
    figures.save_figure(figures.roc_figure(curves, rows), out / "roc.png")
    if len(rows) > 1:
        figures.save_figure(figures.difference_figure(rows), out / "difference.png")
    reliable = figures.reliability_figure(rows, metrics["readings"])
    figures.save_figure(reliable, out / "reliability.png")
    files.write_table(out / "table1.csv", COLUMNS, ([r[name] for name in COLUMNS] for r in rows))
    files.write_json(out / "rows.json", [{name: row[name] for name in RESULTS} for row in rows])
    files.write_json(out / "metrics.json", metrics)
    with files.replace_file(out / "report.html", "w") as file:
        file.write(report(metrics, out))
    runs.finish_folder(out)
    return rows


# --- The folds of a cross-validation ---


def evaluate_folds(folders: Sequence[Path], out: Path) -> list[dict]:
    """The tables over the folds of a cross-validation, from the output of `evaluate` for each.

    AUCs and differences are those within a fold, averaged; what interval and test hold for, and
    that they do not hold for other training sets: `evaluate._mean_auc`. Returns the rows of
    table1.csv. Raises ValueError: a fold missing or twice, a patient tested in two, folds that
    differ in more than their patients.
    """
    folds, tested = [_read_fold(Path(folder)) for folder in folders], {}
    first, same, columns = folds[0]
    for folder, (_, found, table) in zip(folders, folds, strict=True):
        if odd := sorted(set(same) ^ set(found)):
            text = f"differs from {folders[0]} in more than its patients: {odd[0]}"
            raise ValueError(f"{folder}: {text}; evaluate all folds alike")
        who = set(table["patient"].tolist())
        if both := sorted(tested.keys() & who):
            text = f"{len(both)} test patients, such as {both[0]}, are in {tested[both[0]]} too"
            raise ValueError(f"{folder}: {text}; expected each patient in one fold's test split")
        tested |= dict.fromkeys(who, folder)
    given, n = [str(metrics["data"].get("fold")) for metrics, *_ in folds], len(folders)
    if n < 2 or sorted(given) not in (sorted(f"{k + 1}/{n}" for k in range(n)), ["None"] * n):
        raise ValueError(f"--folds: found {', '.join(given)}; expected each K/N of one N once")
    claimed = {"scores": [files.sha256(Path(folder) / "scores.csv") for folder in folders]}
    with runs.claim_folder(out := Path(out), "evaluate", claimed):
        every = {name: np.concatenate([table[name] for *_, table in folds]) for name in columns}
        kind, patients, *told = (every.pop(name) for name in ("class", "patient", *FACTS))
        facts, values = dict(zip(FACTS, told, strict=True)), iter(every.values())
        fold = np.repeat(np.arange(n), [len(table["class"]) for *_, table in folds])
        order = sorted(first["runs"], key=lambda run: run["regime"])  # as `_read_fold`
        scores = {r["regime"]: np.array([next(values) for _ in r["seeds"]]) for r in order}
        scores = {r["regime"]: scores[r["regime"]] for r in first["runs"]}
        metrics = claimed | {"conditions": conditions(kind, patients, scores, "--folds", fold)}
        metrics |= {"controls": [], "runs": first["runs"]}
        metrics["data"] = {key: first["data"][key] for key in first["data"] if key not in OWN}
        sizes = [len(set(patients[fold == k])) for k in range(n)]
        ill = [m["data"]["train_malignant"] for m, *_ in folds]
        metrics["data"]["train_malignant"] = float(np.mean(ill))
        names, flows = [Path(f).parent.name for f in folders], [m["flow"] for m, *_ in folds]
        metrics["folds"] = list(zip(names, given, sizes, ill, flows, strict=True))
        own = [{r["regime"]: r["thresholds"] for r in m["runs"]} for m, *_ in folds]
        limits = {name: np.array([limit[name] for limit in own])[fold].T for name in scores}
        return _write(metrics, kind, patients, facts, scores, limits, out, fold)


def _read_fold(folder: Path) -> tuple[dict, list[str], dict[str, np.ndarray]]:
    """metrics.json, what of it must be the same in every fold, columns of scores.csv by number.

    A fold may have seeds of its own, as many as the others.
    """
    runs.finished(folder, "evaluate")
    with files.reading(folder, "evaluate again"):
        metrics, names = files.read_json(folder / "metrics.json"), []
        assert "train_malignant" in metrics["data"], "of an older version"
        same = [f"patch set: {k} {v}" for k, v in metrics["data"].items() if k not in OWN]
        for run in sorted(metrics["runs"], key=lambda run: run["regime"]):
            sets = [(s["task"], s["control"]) for s in run["config"]["synthetic"]]
            facts = {"number of seeds": len(run["seeds"]), "proportion": run["proportion"]}
            facts = run["config"] | facts | {"data": "", "synthetic": sets}
            same += [f"{run['regime']}: {key} {value}" for key, value in facts.items()]
            names += [f"{run['regime']} seed {seed}" for seed in run["seeds"]]
        table = files.read_table(folder / "scores.csv", ("class", "patient", *FACTS, *names))
        values = {column: table.pop(name).astype(float) for column, name in enumerate(names)}
        return metrics, same, table | values


def _keep_pictures(sets: list[patchset.SyntheticSet], k: int, out: Path) -> None:
    """Set k's row of Figure 1, and how its GAN was trained unless an earlier set shows that."""
    shown = sets[k].generator in [syn.generator for syn in sets[:k]]
    for name in ("figure1",) if shown else ("figure1", "gan"):
        if (sets[k].path / f"{name}.png").exists():
            with files.replace_file(out / f"{name}-{k}.png") as file:
                file.write((sets[k].path / f"{name}.png").read_bytes())


def figures_4_to_6(
    regimes: list[results.Regime], splits, sets, scores, device, seed: int, out: Path
) -> dict:
    """t-SNE of the baseline's features (F4); the patches that a regime rescues (F5, F6).

    The paper's 50% regime where it was run, else the first; the first seed of each.
    """
    test, facts, rescued, models = splits["test"], {}, [], regimes[:1]
    others = [r for r in regimes[1:] if r.proportion and not results.is_control(r.name)]
    if others:
        chosen = next((r for r in others if r.name == "50% w/ decay"), others[0])
        malignant = np.flatnonzero(np.char.startswith(test.kind, "malignant"))
        base, ours = (scores[name][0, malignant] for name in (BASELINE, chosen.name))
        best, facts = results.rescue(base, ours)
        patients = test.column("patient_id")[malignant[best]]
        facts |= {"regime": chosen.name, "patients": len(set(patients))}
        if len(best):
            models, rescued = [regimes[0], chosen], test[malignant[best]]
            titles = [f"{base[i]:.2f} to {ours[i]:.2f}" for i in best]
            figures.save_figure(figures.patch_figure([("", rescued, titles)]), out / "figure6.png")
    sources = splits["val"].parts | {s.task: s.combined for s in sets[::-1] if not s.control}
    rng, points = np.random.default_rng(seed), {}
    for kind, (count, *_) in results.EMBEDDED.items():
        if kind in sources:
            points[kind] = sources[kind][np.sort(rng.permutation(len(sources[kind]))[:count])]
    facts["points"] = {kind: len(values) for kind, values in points.items()}
    points |= {"rescued": rescued} if len(rescued) else {}
    groups, panels = np.repeat(list(points), list(map(len, points.values()))), {}
    for regime in models:
        features = results.pooled_features(regime, device)
        deep = np.concatenate(list(map(features, points.values())))
        panels[regime.name] = results.embed(deep, seed)
    alone = groups != "rescued"
    first = {BASELINE: panels[BASELINE][alone]}
    figure = figures.embedding_figure(first, groups[alone], results.EMBEDDED)
    figures.save_figure(figure, out / "figure4.png")
    if len(rescued):
        figure = figures.embedding_figure(panels, groups, results.EMBEDDED)
        figures.save_figure(figure, out / "figure5.png")
    return facts


# --- In words ---


def title(run: dict) -> str:
    """A regime's name, the blob control's with its proportion."""
    control = results.is_control(run["regime"])
    return run["regime"] + f" ({100 * run['proportion']:g}%)" * control


def in_words(value: Sequence[float | None] | None, form: str = ".3f") -> str:
    """(value, low, high, ...) with its interval, or (value,) alone."""
    if value is None or value[0] is None:
        return "-"
    value, *ends = (f"{v:{form}}" for v in value[:3])
    return f"{value} ({' to '.join(ends)})" if ends else value


def p_in_words(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def difference_in_words(row: dict) -> str:
    return in_words([row[name] for name in ("delta", "delta_low", "delta_high")], "+.3f")


def verdict(row: dict, rows: list[dict]) -> str:
    """In plain words whether a regime's difference (`evaluate.compared_with`) counts as found.

    Its clustered interval must exclude zero, over seeds too, its p hold for the number of regimes
    (Holm), and the regime be told from the blob control in the same direction, by the same test.
    """
    if row["delta"] is None:
        return "-"
    if row["p_clustered"] >= results.ALPHA:
        return f"not found (one of {row['detectable']:.3f} would be, with 80% power)"
    word, name = "higher" if row["delta"] > 0 else "lower", row["regime"]
    word += f" than {row['reference']}" * (row["reference"] != BASELINE)
    if not results.is_hypothesis(name):
        bump = "with a featureless bump" if results.is_control(name) else "without synthetic ones"
        return f"{word}, {bump}"
    if ", " in name and row["reference"] == BASELINE:
        return f"{word}, but not found: the augmentation alone was not run"
    if min(r["seeds"] for r in rows if r["regime"] in (name, row["reference"])) == 1:
        return f"{word} for these models, but not found: train several (--seeds)"
    if row["p_clustered_holm"] >= results.ALPHA:
        p = p_in_words(row["p_clustered_holm"])
        return f"{word}, but not found: p is {p} for the number of regimes (Holm)"
    if "against_blob" not in row:
        return f"{word}, but not found: no blob control was run alike"
    blob = row["against_blob"]
    against = f"against the blob control {difference_in_words(blob)}"
    if blob["p_clustered"] >= results.ALPHA or blob["delta"] * row["delta"] < 0:
        return f"{word}, but not found: a featureless bump may do the same ({against})"
    return f"found: {word}; {against}"


# --- report.html: one file, no script, for a screen, a telephone and paper ---


def _statistic(row: dict, names: tuple[str, ...]) -> str:
    """A cell of STATISTICS: a p with Holm's in brackets, or a value with its ends."""
    name, signed = names[0], names[0].startswith("delta")
    if not name.startswith("p_") or row[name] is None:
        return in_words([row[name] for name in names], "+.3f" if signed else ".3f")
    return f"{p_in_words(row[name])} ({p_in_words(row[f'{name}_holm'])})"


def _pictures(controls: list[dict], out: Path) -> dict[str, list[dict]]:
    """The figures in `out` by name; Figure 1 and the GAN's training have one for each set."""
    titles = {"": ""} | {f"-{k}": f"{c['set']} ({c['task']})" for k, c in enumerate(controls)}
    pictures = {name: [] for name in PICTURES}
    for name, shown in pictures.items():
        for end, title in titles.items():
            if (path := out / f"{name}{end}.png").exists():
                body = base64.b64encode(path.read_bytes()).decode()
                shown.append({"file": path.name, "title": title, "base64": body})
    return pictures


def report(metrics: dict, out: Path) -> str:
    """report.html: metrics.json in words, with the figures in `out` inside."""
    main = metrics["conditions"][MAIN]
    verdicts = {row["regime"]: verdict(row, main["rows"]) for row in main["rows"]}
    loader, trim = jinja2.FileSystemLoader(Path(__file__).parent), {"trim_blocks": True}
    trim |= {"lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    template = jinja2.Environment(loader=loader, autoescape=True, **trim)
    names = {"metrics": metrics, "main_name": MAIN, "main": main, "statistics": STATISTICS}
    names["titles"] = {run["regime"]: title(run) for run in metrics["runs"]}
    names |= {"splits": SPLITS, "classes": CLASSES, "conditions": results.CONDITIONS}
    names |= {"better": [n for n, text in verdicts.items() if text.startswith("found: higher")]}
    names |= {"pictures": _pictures(metrics["controls"], out), "verdict": verdict}
    names |= {"in_words": in_words, "difference_in_words": difference_in_words}
    return template.get_template("report.html.j2").render(names, statistic=_statistic)
