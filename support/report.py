"""The whole evaluation, and report.html: metrics.json in words."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch

import data
from evaluate import (
    ALPHA,
    BASELINE,
    BLOB,
    CONDITIONS,
    EMBEDDED,
    MAIN,
    Regime,
    condition_table,
    embed,
    open_regimes,
    open_split,
    rescue,
    roc_band,
    score,
)
from support import files, patchset, runs, sources
from support.controls import control_of, lesion_or_image, pooled_features
from support.figures import (
    difference_figure,
    embedding_figure,
    patch_figure,
    roc_figure,
    save_figure,
)

PAPER_TABLE_1 = {  # E1, E2; the text says p < 1e-8 for the 50% row (Q37)
    "Baseline": ("0.829", "-"),
    "10% w/ decay": ("0.837", "0.10"),
    "25% w/ decay": ("0.839", "0.055"),
    "50% w/ decay": ("0.846", "1e-4"),
    "75% w/ decay": ("0.828", "0.72"),
    "100% w/ decay": ("0.797", "1e-8"),
}
COLUMNS = (  # of table1.csv
    *("regime", "proportion", "seeds", "patients", "patches", "auc", "low", "high"),
    *("delta", "delta_low", "delta_high", "p_delong", "p_clustered"),
)


# --- The whole evaluation ---


def evaluate(
    patch_set: Path,
    baseline: Path,
    augmented: Sequence[Path],
    synthetic: Sequence[Path],
    out: Path,
    holm: bool = False,
    skipped: Sequence[tuple[str, str]] = (),
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[dict]:
    """Table 1 with statistics that hold, controls, Figures 1, 4, 5, 6, and report.html.

    skipped: (regime, reason) of rows that could not be trained; they stay in the table, empty.
    Returns the rows of table1.csv with what was concluded. Raises ValueError: runs or sets of
    another patch set, unfinished runs, fewer than two test patients a class.
    """
    patch_set, out, device = Path(patch_set), Path(out), torch.device(device)
    config = patchset.patch_config(patch_set)
    regimes = open_regimes(baseline, augmented, config["fingerprint"])
    sets = [patchset.open_synthetic(path) for path in synthetic]
    for syn in sets:
        patchset.check_synthetic(syn, patch_set)
    claimed = {"data": config["fingerprint"], "regimes": [[r.name, *r.hashes] for r in regimes]}
    claimed |= {"synthetic": [s.fingerprint for s in sets], "holm": holm, "seed": seed}
    claimed["skipped"] = [list(s) for s in skipped]
    stages = sum(len(r.runs) for r in regimes) + len(sets) + 1
    claim = runs.claim_folder(out, "evaluate", claimed)
    with claim, runs.progress(stages, "evaluate") as advance:
        splits = {split: open_split(patch_set, split) for split in sources.SPLITS}
        test, scores = splits["test"], {}
        for regime in regimes:
            scores[regime.name] = score(regime, test, device)
            advance(len(regime.runs), f"{regime.name} scored")
        there = {c: set(" ".join(CONDITIONS[c]).split()) & set(test.values) for c in CONDITIONS}
        tables = {  # with one kind of lesion only, the whole test set is not shown again
            c: condition_table(test, scores, c, holm, seed)
            for c in CONDITIONS
            if c == MAIN or there[c] != there[MAIN]
        }
        if not tables[MAIN]:
            raise ValueError(f"{patch_set}: fewer than two test patients a class; prepare more")
        rows, at = tables[MAIN]["rows"], np.isin(test.kind, list(there[MAIN]))
        y, patients = test.kind[at] != "normal", test.patient[at]
        bands = {name: roc_band(y, s[:, at], patients, seed) for name, s in scores.items()}
        save_figure(roc_figure(bands, rows), out / "roc.png")
        if len(rows) > 1:
            save_figure(difference_figure(rows), out / "difference.png")
        features, controls, nearest = pooled_features(regimes[0], device), [], []
        for k, syn in enumerate(sets):
            found, closest = control_of(syn, splits, features, device, seed)
            controls.append(found)
            nearest += [(syn.path.name, closest, ("synthetic", "nearest"))] if closest else []
            new = syn.generator not in [s.generator for s in sets[:k]]
            for name in ("figure1", "gan")[: 1 + new]:  # of synthesize: a row of Figure 1, training
                if (syn.path / f"{name}.png").exists():
                    with files.replace_file(out / f"{name}-{k}.png") as file:
                        file.write((syn.path / f"{name}.png").read_bytes())
            advance(1, f"{syn.path.name}: controls")
        if nearest:
            save_figure(patch_figure(nearest), out / "nearest.png")
        metrics = claimed | {"conditions": tables, "controls": controls}
        metrics["data"] = {"name": patch_set.name, **config}
        metrics["lesion_or_image"] = {n: lesion_or_image(test, s) for n, s in scores.items()}
        metrics["feature_space"] = figures_4_to_6(regimes, splits, sets, scores, device, seed, out)
        metrics["data"]["patients"] = {
            f"{split}/{kind}": len(set(patches.patients(kind)))
            for split, patches in splits.items()
            for kind in patches.values
        }
        names = ("regime", "run", "seeds", "weights", "config")
        facts = [(r.name, r.folder.name, r.seeds, r.hashes, r.config) for r in regimes]
        metrics["runs"] = [dict(zip(names, fact, strict=True)) for fact in facts]
        lines = [row | {"proportion": r.proportion} for row, r in zip(rows, regimes, strict=True)]
        empty = dict.fromkeys(COLUMNS) | {"seeds": 0}
        lines += [empty | {"regime": name, "reason": reason} for name, reason in skipped]
        table = ([line[column] for column in COLUMNS] for line in lines)
        files.write_table(out / "table1.csv", COLUMNS, table)
        files.write_json(out / "metrics.json", metrics)
        with files.replace_file(out / "report.html", "w") as file:
            file.write(report(metrics, out))
        advance(1, "report written")
        runs.finish_folder(out)
    return lines


# --- The report: one file, no script, for a screen, a telephone and paper ---

STYLE = """
* { box-sizing: border-box; } h2, h3 { break-after: avoid; } tr, figure { break-inside: avoid; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto;
  max-width: 62rem; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.2; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; border-top: 2px solid #0b62a8; padding-top: .5rem; }
.box { border-left: 4px solid #c2500a; background: #fdf3ec; padding: .6rem .9rem; }
.note, figcaption { color: #444; font-size: .88rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem .3rem 0;
  border-bottom: 1px solid #d8d8d8; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } img { width: 46rem; max-width: 100%; display: block; }
@media screen and (max-width: 40rem) { thead, .none { display: none !important; }
  tr { display: block; border: 1px solid #ccc; border-radius: 6px; margin: .6rem 0; padding: .4rem }
  tbody th { display: block; font-size: 1rem; border: 0; }
  td { display: flex; gap: .8rem; border: 0; padding: .12rem 0; }
  td::before { content: attr(data-label); flex: 0 0 40%; color: #555; } }
@media print { body { font-size: 9pt; max-width: none; padding: 0; } table { font-size: 7.5pt; }
  img { width: 34rem; } @page { margin: 13mm; } }
"""
CAPTIONS = {
    "difference": "Difference in AUC to the baseline, 95% interval over patients and seeds. Ticks: "
    "single seeds.",
    "roc": "ROC curves, mean over seeds, with pointwise 95% bands over patients.",
    "figure1": "Figure 1. Pairs: real patch (left), synthetic one (right). From the top: {}.",
    "nearest": "The three synthetic patches of each set closest to a training patch of the class "
    "in the baseline's features, and that patch.",
    "gan": "How the GANs were trained. Healthy: D gets neither all nor nothing right, the norm of "
    "its gradient is near one, lesions neither vanish nor fill the patch and differ with the "
    "input and the noise (spread). From the top: {}.",
    "figure4": "Figure 4. t-SNE of the baseline's pooled features. Real patches are the stored "
    "validation patches; synthetic ones come from training patients.",
    "figure5": "Figure 5. The rescued patches among the points of Figure 4.",
    "figure6": "Figure 6. The rescued patches: p(cancer) before and after.",
}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Synthetic lesions: evaluation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><h1>Do synthetic lesions improve a breast cancer patch classifier?</h1>
<p class="box"><b>Research only, not for clinical use.</b> An AUC on patches that hold annotated
lesions says nothing about sensitivity on whole mammograms or in screening.</p>
<h2>In short</h2><p><b>{answer}</b> A difference to the baseline counts as found only if its
clustered interval excludes zero, its p stays under 0.05 when corrected for the number of regimes
(Holm), several seeds were trained, and the regime differs in the same direction from the blob
control (a smooth bump of the same size and brightness in place of each lesion, at the proportion
given below).</p><ul>{short}</ul>
<h2>Table 1: the whole test set</h2>{table1}
<p class="note">Difference: to the baseline. Intervals and <i>p, patients</i>: patients are the unit
(Obuchowski 1997); with several training seeds the difference must hold beyond these trainings too
(Obuchowski and Rockette 1995, seeds as readers). Bootstrap: patients drawn with replacement, the
models stay. <i>p, DeLong</i>: the paper's test, which takes every patch for a new patient. {holm}
Paper: Table 1, on OMI-DB; other data give other values. The paper contradicts itself (Q37): its
text has p &lt; 1e-8 for 50% where the table has 1e-4, and calls 10% and 25% significant where the
table has 0.10 and 0.055. The table fits the AUCs better.</p>{difference}{roc}
<h2>Other test conditions</h2>{conditions}
<p class="note">Against benign: a classifier that was given no benign patches (Q36) finds lesions,
whatever they are; expect little more than 0.5.</p>
<h2>Lesion or image?</h2>{seen}
<p class="note">AUC (95% CI), number of images. Same image: over the pairs of a lesion and a normal
patch of one image; a model that recognises images has 0.5 there. Normal patches alone: well above
0.5 if images with cancer are known by their normal tissue.</p>
<h2>Are the synthetic patches realistic?</h2>{figure1}{controls}
<p class="note">Told apart: AUC of a detector of synthetic patches, cross-validated, each patient in
one fold; 0.5 is chance, 1 always. By features: logistic regression on the baseline's features,
against validation patches; the floor is the same for real training patches: what differs between
the splits and what the baseline remembers. By pixels: a small network, against training patches;
lesions put into other patients' tissue need not reach 0.5. KID: kernel inception distance on the
same features (standardised, of equal length), unbiased, without pairs of one patient, interval by
jackknife over patients. Nearer: the share of synthetic patches nearer to a training patch than the
nearest 1% of real validation patches; copies would make it far more than 1%.</p>{nearest}{gan}
<h2>Feature space</h2>{figure4}<p>{rescued}</p>{figure5}{figure6}
<h2>What was run</h2><p><code>{command}</code></p>{held}{runs}
<h2>How to read this</h2><ul>
<li>No difference shown is not equality: see from which size on one would have been found.</li>
<li>Patches of one patient resemble each other, so DeLong's test calls too much significant. With
fewer than about 30 patients on either side, or with only two seeds, the clustered intervals are
rather too narrow as well.</li>
<li>With one seed the result is about these very models; training again may give another.</li>
</ul><p class="note">The same for machines: table1.csv and metrics.json.</p></body></html>
"""


def in_words(value: Sequence[float | None] | None, form: str = ".3f") -> str:
    """(value, low, high, ...) with its interval."""
    if value is None or value[0] is None:
        return "-"
    return "{} ({} to {})".format(*(f"{v:{form}}" for v in value[:3]))


def p_in_words(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def difference_in_words(row: dict, kind: str = "") -> str:
    return in_words([row[f"delta{end}"] for end in ("", f"{kind}_low", f"{kind}_high")], "+.3f")


def verdict(row: dict, rows: list[dict]) -> str:
    """In plain words whether a difference to the baseline counts as found.

    Its clustered interval must exclude zero, over seeds too, its p hold for the number of regimes
    (Holm), and the regime be told from the blob control in the same direction, by the same test.
    """
    if row["delta"] is None:
        return "-"
    if row["p_clustered_raw"] >= ALPHA:
        return f"not found (one of {row['detectable']:.3f} would be, with 80% power)"
    word = "higher" if row["delta"] > 0 else "lower"
    if row["regime"] == BLOB:
        return f"{word}, with a featureless bump"
    if min(r["seeds"] for r in (row, rows[0])) == 1:
        return f"{word} for these models, but not found: train several (--seeds)"
    if row["p_clustered_holm"] >= ALPHA:
        p = p_in_words(row["p_clustered_holm"])
        return f"{word}, but not found: p is {p} for the number of regimes (Holm)"
    if BLOB not in [r["regime"] for r in rows]:
        return f"{word}, but not found: no blob control was run"
    blob = row["against_blob"]
    against = f"against the blob control {difference_in_words(blob)}"
    if blob["p_clustered"] >= ALPHA or blob["delta"] * row["delta"] < 0:
        return f"{word}, but not found: a featureless bump may do the same ({against})"
    return f"found: {word}; {against}"


def _table(head: str, rows: Sequence[Sequence]) -> str:
    """Escaped; on a telephone each row is a card and each cell carries its heading."""
    if not rows:
        return "<p>None was run.</p>"
    head = [escape(h) for h in head.split("|")]
    html = "".join(f'<th scope="col">{h}</th>' for h in head)
    html = f"<table><thead><tr>{html}</tr></thead><tbody>"
    for first, *cells in rows:
        html += f'<tr><th scope="row">{escape(str(first))}</th>'
        for h, cell in zip(head[1:], map(str, cells), strict=True):
            empty = ' class="none"' if cell == "-" else ""
            html += f'<td{empty} data-label="{h}"><span>{escape(cell)}</span></td>'
        html += "</tr>"
    return html + "</tbody></table>"


def _condition(found: dict, skipped: Sequence = (), paper: bool = False) -> str:
    rows = []
    for r in found["rows"]:
        differences = (difference_in_words(r, kind) for kind in ("", "_bootstrap"))
        cells = [r["seeds"], in_words((r["auc"], r["low"], r["high"])), *differences]
        p = (p_in_words(r[key]) for key in ("p_clustered", "p_delong"))
        rows.append([r["regime"], *cells, *p, verdict(r, found["rows"])])
    rows += [[name, 0, *"-----", f"not run: {reason}"] for name, reason in skipped]
    for row in rows if paper else ():
        row += PAPER_TABLE_1.get(row[0], ("-", "-"))
    head = "Regime|Seeds|AUC (95% CI)|Difference (95% CI)|Bootstrap|p, patients|p, DeLong|Result"
    size = "{patches} test patches of {patients} patients; {positives} malignant ones of "
    size = (size + "{positive_patients} patients.").format(**found)
    return f"<p>{size}</p>" + _table(head + ("|Paper: AUC|Paper: p" if paper else ""), rows)


def _rescued(facts: dict) -> str:
    if "regime" not in facts:
        return "Figures 5 and 6 need an augmented regime."
    text = "{up} malignant test patches rise from below 0.5 to above it under {regime}, {down} "
    text += "fall (first seed of each)."
    if facts["up"]:
        text += " The largest rises (Figures 5 and 6; at most five, of {patients} patients) are "
        text += "{rise:.2f} on average; the paper's 0.32. Some of so many are large by chance."
    text += " The largest falls are {fall:.2f} on average." if facts["down"] else ""
    return escape(text.format(**facts))


def _controls(controls: list[dict]) -> str:
    """One column a synthetic set."""
    forms = {"Accepted": ("acceptance", ".1%"), "Object, median": ("area_median", ".1%")}
    forms["Mean change inside"] = "strength", "+.3f"
    lines = {"Task": [c["task"] for c in controls]}
    lines["Made"] = ["{samples} of {requested}, {patients} patients".format(**c) for c in controls]
    lines |= {name: [f"{c[key]:{form}}" for c in controls] for name, (key, form) in forms.items()}
    forms = {"Told apart by features": "linear", "(its floor)": "floor_linear"}
    forms |= {"Told apart by pixels": "network", "KID x 1000": "kid", "(floor of KID)": "floor_kid"}
    lines |= {name: [in_words(c.get(key), ".2f") for c in controls] for name, key in forms.items()}
    nearest = [c.get("nearest") for c in controls]
    lines["Nearer to training"] = [f"{n['closer']:.1%}" if n else "-" for n in nearest]
    if any(c["warnings"] for c in controls):
        lines["Remarks"] = [" ".join(c["warnings"]) or "-" for c in controls]
    head = "|".join(["Set", *(c["set"].replace("|", "/") for c in controls)])
    return _table(head, [[name, *cells] for name, cells in lines.items()] if controls else [])


def _runs(metrics: dict) -> str:
    """What everything was made with."""

    def options(config: dict) -> str:
        hidden = ("data", "name", "fingerprint", "counts", "held", "patients", "key", "synthetic")
        hidden += ("generator", "task", "seed", "source")
        return ", ".join(f"{key} {value}" for key, value in config.items() if key not in hidden)

    config = metrics["data"]
    rows = [["Patch set", config["name"], config["seed"], config["fingerprint"][:12], config]]
    for hash_, gan in {c["generator"]: c["gan"] for c in metrics["controls"]}.items():
        rows.append([f"GAN, {gan.get('task', '-')}", "-", gan.get("seed", "-"), hash_[:12], gan])
    for c in metrics["controls"]:
        made = c["config"]
        rows.append([f"Set, {c['task']}", c["set"], made["seed"], c["fingerprint"][:12], made])
    for r in metrics["runs"]:
        seeds, hashes = ", ".join(map(str, r["seeds"])), ", ".join(h[:12] for h in r["weights"])
        used = [s["fingerprint"][:12] for s in r["config"]["synthetic"]]
        rows.append([r["regime"], r["run"], seeds, hashes, r["config"] | {"sets": used}])
    rows = [[*cells, options(config) or "-"] for *cells, config in rows]
    return _table("What|Folder|Seeds|Fingerprint, weights (sha256)|Options", rows)


def report(metrics: dict, out: Path) -> str:
    """report.html: metrics.json in words, with the figures in `out` inside."""
    main, controls, config = metrics["conditions"][MAIN], metrics["controls"], metrics["data"]
    rows, slots = main["rows"], {}
    for name, caption in CAPTIONS.items():
        html, shown = "", []
        pictures = {f"{name}-{k}.png": f"{c['set']} ({c['task']})" for k, c in enumerate(controls)}
        for file, title in ({f"{name}.png": ""} | pictures).items():
            if (out / file).exists():
                uri = base64.b64encode((out / file).read_bytes()).decode()
                html += f'<img src="data:image/png;base64,{uri}" alt="{file}, described below">'
                shown.append(escape(title))
        text = caption.format(", ".join(shown))
        slots[name] = html and f"<figure>{html}<figcaption>{text}</figcaption></figure>"
    short, conditions = "", ""
    for row in rows:
        text = f"{row['regime']}: AUC {in_words((row['auc'], row['low'], row['high']))}"
        if row["delta"] is not None:
            text += f", difference {difference_in_words(row)}: {verdict(row, rows)}"
        short += f"<li>{escape(text)}</li>"
    better = [r["regime"] for r in rows if verdict(r, rows).startswith("found: higher")]
    answer = f"Here synthetic lesions helped: {', '.join(better)}."
    for name, found in metrics["conditions"].items():
        if name != MAIN:
            few = "<p>Not computed: fewer than two test patients a class.</p>"
            conditions += f"<h3>{name}</h3>{_condition(found) if found else few}"
    seen = metrics["lesion_or_image"]
    keys = "|".join(["Regime", *seen[BASELINE]])
    seen = [
        [name, *(f"{in_words(v)}, {v[3]}" if v else "-" for v in found.values())]
        for name, found in seen.items()
    ]
    held = []
    for kind in data.CLASSES:
        at = [f"{split}/{kind}" for split in sources.SPLITS]
        cells = (
            f"{config['held'][k]} ({n})" if (n := config["patients"].get(k)) else "-" for k in at
        )
        held.append([kind, *cells])
    command = [f"mamgan.py evaluate --data {config['name']} --baseline {metrics['runs'][0]['run']}"]
    command += [f"--augmented {r['run']}" for r in metrics["runs"][1:]]
    command += [f"--synthetic {c['set']}" for c in controls]
    command += [*(["--holm"] if metrics["holm"] else []), f"--seed {metrics['seed']}"]
    holm = "Not corrected for the number of regimes, as in the paper (--holm does; the verdict is)."
    if metrics["holm"]:
        holm = "Both p-values are corrected for the number of regimes (Holm); intervals are not."
    return PAGE.format(
        **slots,
        style=STYLE,
        answer=escape(answer if better else "No evidence here that synthetic lesions help."),
        short=short,
        table1=_condition(main, metrics["skipped"], paper=True),
        holm=holm,
        conditions=conditions,
        seen=_table(keys, seen),
        controls=_controls(controls),
        rescued=_rescued(metrics["feature_space"]),
        command=escape(" ".join(command)),
        held=_table("|".join(["Patches (patients)", *sources.SPLITS]), held),
        runs=_runs(metrics),
    )


def figures_4_to_6(
    regimes: list[Regime], splits, sets, scores: dict[str, np.ndarray], device, seed: int, out: Path
) -> dict:
    """t-SNE of the baseline's features (F4); the patches that a regime rescues (F5, F6).

    The paper's 50% regime where it was run, else the first; the first seed of each.
    """
    test, facts, rescued, models = splits["test"], {}, [], regimes[:1]
    others = [regime for regime in regimes if regime.name not in (BASELINE, BLOB)]
    if others:
        chosen = next((r for r in others if r.name == "50% w/ decay"), others[0])
        malignant = np.flatnonzero(np.char.startswith(test.kind, "malignant"))
        base, ours = (scores[name][0, malignant] for name in (BASELINE, chosen.name))
        best, facts = rescue(base, ours)
        facts |= {"regime": chosen.name, "patients": len(set(test.patient[malignant[best]]))}
        if rescued := [test[i] for i in malignant[best]]:
            models = [regimes[0], chosen]
            titles = [f"{base[i]:.2f} to {ours[i]:.2f}" for i in best]
            save_figure(patch_figure([("", rescued, titles)]), out / "figure6.png")
    sources = splits["val"].values | {s.task: s.combined for s in sets[::-1] if not s.control}
    rng, points = np.random.default_rng(seed), {}
    for kind, (count, *_) in EMBEDDED.items():
        if kind in sources:
            points[kind] = sources[kind][np.sort(rng.permutation(len(sources[kind]))[:count])]
    facts["points"] = {kind: len(values) for kind, values in points.items()}
    points |= {"rescued": np.array(rescued)} if rescued else {}
    groups, panels = np.repeat(list(points), list(map(len, points.values()))), {}
    for regime in models:
        features = pooled_features(regime, device)
        panels[regime.name] = embed(np.concatenate(list(map(features, points.values()))), seed)
    alone = groups != "rescued"
    first = {BASELINE: panels[BASELINE][alone]}
    save_figure(embedding_figure(first, groups[alone], EMBEDDED), out / "figure4.png")
    if rescued:
        save_figure(embedding_figure(panels, groups, EMBEDDED), out / "figure5.png")
    return facts
