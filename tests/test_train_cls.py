"""§3 Patch Classifier Training: sampling, decay, resume, selection, refusals."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import mamgan
import train
from support import files, patchset, runs, sources
from train import ClassifierBatches, ClassifierConfig, synthetic_proportion, train_classifier

CPU = torch.device("cpu")
TINY = ClassifierConfig(
    samples=400,
    batch_size=16,
    learning_rate=1e-3,
    decay_every=40,
    evaluate_every=80,
    weights="none",
    network="small",
    width=8,
)
SIDE = 32
CODES = {"normal": 1, "malignant_mass": 2, "malignant_calcification": 3, "benign_mass": 4}


def write_patches(out: Path, n: int = 30) -> Path:
    """Normal patches are dark, malignant ones bright; pixel (0, 0) tells class and number."""
    keys = [f"{s}/{c}" for s in sources.SPLITS for c in CODES if s == "train" or "benign" not in c]
    rng = np.random.default_rng(0)
    with runs.claim_folder(out, "prepare", {"patch_size": SIDE, "spacing_mm": 0.33, "n": n}):
        for key in keys:
            code = CODES[key.partition("/")[2]]
            patches = rng.integers(0, 30_000, (n, SIDE, SIDE)) + 5_000 * (1 < code < 4)
            patches[:, 0, 0] = 1_000 * code + np.arange(n)
            (out / "patches" / key).parent.mkdir(parents=True, exist_ok=True)
            np.save(out / "patches" / f"{key}.npy", patches.astype(np.uint16))
            origin = [("u", f"patient-{key.partition('/')[0]}")]
            files.write_table(out / "patches" / f"{key}.csv", ("image_uid", "patient_id"), origin)
        rows = [(f"patient-{s}", s) for s in sources.SPLITS]
        files.write_table(out / "splits.csv", ("patient_id", "split"), rows)
        runs.finish_folder(out, counts=dict.fromkeys(keys, n))
    return out


def write_synthetic(
    out: Path, patches: Path, task: str, n=20, patient="patient-train", control: str = ""
) -> Path:
    code = 7 if task == "removal" else 6
    origin = patchset.patch_config(patches)["fingerprint"]
    config = {"task": task, "control": control, "n": n, "patch_size": SIDE, "generator": "g"}
    with runs.claim_folder(out, "synthesize", config | {"data": origin}):
        combined = np.full((n, SIDE, SIDE), 1_000 * code, np.uint16)
        combined[:, 0, 0] += np.arange(n, dtype=np.uint16)
        np.save(out / "combined.npy", combined)
        np.save(out / "input.npy", combined)
        np.save(out / "lesion.npy", np.zeros(combined.shape, np.int32))
        np.save(out / "mask.npy", np.zeros(combined.shape, bool))
        rows = [(i, i, "u", patient, 0, 9, 0, 0, 3, 3) for i in range(n)]
        files.write_table(out / "index.csv", patchset.SYNTHETIC_COLUMNS, rows)
        runs.finish_folder(out, short=False, written=n, gan={"data": origin})
    return out


@pytest.fixture(scope="module")
def patches(tmp_path_factory) -> Path:
    return write_patches(tmp_path_factory.mktemp("data") / "patches")


@pytest.fixture(scope="module")
def sets(patches, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sets")
    return [write_synthetic(folder / t, patches, t) for t in ("mass", "calcification", "removal")]


def drawn(config: ClassifierConfig, patches: Path, sets: list[Path]) -> tuple[np.ndarray, ...]:
    """Labels, codes (see write_patches), numbers and synthetic counts of every step."""
    opened = [patchset.open_synthetic(s) for s in sets]
    batches = ClassifierBatches(config, patches, opened, CPU)
    steps = [batches.draw(i) for i in range(-(-config.samples // config.batch_size))]
    first = torch.cat([x[:, 0, 0, 0] for x, _, _ in steps]).numpy()
    values = data.to_uint16(first).astype(int)
    labels = torch.cat([y for _, y, _ in steps]).numpy()
    return (
        labels,
        values // 1_000,
        values % 1_000,
        np.array([len(x) * float(s) for x, _, s in steps]),
    )


# --- Configuration and decay ---


def test_C3_C4_C5_C7_paper_preset_holds_the_papers_numbers():
    c = train.CLASSIFIER_PRESETS["paper"]
    assert (c.samples, c.learning_rate, c.decay, c.decay_every) == (500_000, 1e-5, 0.9, 5_000)
    assert (c.evaluate_every, c.weights, c.network) == (5_000, "imagenet", "resnet50")
    assert (c.average, c.augment) == (0, "")
    assert train.CLASSIFIER_ADAM == {"betas": (0.9, 0.999), "eps": 1e-8}
    assert c.samples % c.batch_size == 0


@pytest.mark.parametrize(
    ("initial", "at", "expected"),
    [
        (0.10, 0, 0.10),
        (0.25, 4_999, 0.25),
        (0.50, 5_000, 0.45),
        (0.75, 10_000, 0.6075),
        (1.00, 50_000, 0.3486784401),
        (0.50, 250_000, 2.576888e-3),
        (0.50, 499_999, 1.475633e-5),
        (0.10, 500_000, 2.656140e-6),
    ],
)
def test_C5_proportion_decays_by_ten_percent_every_5000_samples(initial, at, expected):
    assert synthetic_proportion(initial, at) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("initial", "expected"), [(0.1, 4_999.87), (1.0, 49_998.67)])
def test_C5_expected_number_of_synthetic_draws(initial, expected):
    total = synthetic_proportion(initial, np.arange(500_000)).sum()
    assert total == pytest.approx(expected, abs=0.01)


# --- Sampling ---


def test_C2_labels_are_equally_likely_and_belong_to_their_patches(patches, sets):
    config = dataclasses.replace(TINY, samples=4_000, proportion=0.5, decay_every=2_000)
    labels, codes, _, _ = drawn(config, patches, sets)
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(4_000)
    assert set(codes[labels == 1]) == {2, 3, 6}
    assert set(codes[labels == 0]) == {1, 7}


def test_C5_Q34_synthetic_share_follows_the_decay_for_both_classes(patches, sets):
    config = dataclasses.replace(TINY, samples=8_000, proportion=0.5, decay_every=800)
    labels, codes, _, counted = drawn(config, patches, sets)
    synthetic = codes >= 6
    p = synthetic_proportion(0.5, np.arange(8_000), 0.9, 800)
    assert counted.sum() == synthetic.sum()
    for chosen in (labels == 1, labels == 0, np.arange(8_000) < 800, np.arange(8_000) >= 7_200):
        expected, spread = p[chosen].sum(), np.sqrt((p * (1 - p))[chosen].sum())
        assert abs(synthetic[chosen].sum() - expected) < 4 * spread


def test_C6_proportion_one_starts_all_synthetic_and_zero_is_all_real(patches, sets):
    _, codes, _, _ = drawn(dataclasses.replace(TINY, proportion=1.0), patches, sets)
    assert (codes[:40] >= 6).all()
    _, codes, _, counted = drawn(TINY, patches, [])
    assert (codes < 6).all()
    assert counted.sum() == 0


def test_Q35_every_patch_of_a_pool_is_equally_likely(patches, sets):
    config = dataclasses.replace(TINY, samples=12_000)
    labels, codes, numbers, _ = drawn(config, patches, [])
    counts = np.bincount((codes[labels == 1] - 2) * 30 + numbers[labels == 1], minlength=60)
    expected = counts.sum() / 60  # 60 real positives, both lesion types
    assert ((counts - expected) ** 2 / expected).sum() < 102.7  # chi-square, 59 df, p = 0.0004


def test_without_a_removal_set_synthetic_patches_replace_positives_only(patches, sets, capsys):
    config = dataclasses.replace(TINY, samples=800, proportion=1.0, decay_every=800)
    labels, codes, _, _ = drawn(config, patches, sets[:2])
    assert set(codes[labels == 1]) == {6}
    assert set(codes[labels == 0]) == {1}


def test_Q36_benign_patches_are_negatives_only_when_asked_for(patches):
    config = dataclasses.replace(TINY, samples=800, include_benign=True)
    labels, codes, _, _ = drawn(config, patches, [])
    assert set(codes[labels == 0]) == {1, 4}
    assert 4 not in drawn(TINY, patches, [])[1]


# --- Runs ---


def log_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.fixture(scope="module")
def finished(patches, sets, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train_classifier(dataclasses.replace(TINY, proportion=0.5), patches, run, sets, CPU)
    return run


def test_C7_weights_of_the_best_validation_auc_are_kept(finished, patches):
    rows = log_of(finished)
    assert [row["samples_seen"] for row in rows] == [80, 160, 240, 320, 400]
    best = max(rows, key=lambda row: row["val_auc"])
    model, _ = train.load_classifier(finished, CPU)
    assert train.validation_auc(model, patches, CPU) == best["val_auc"]
    assert files.read_json(finished / "config.json")["best"] == {
        k: best[k] for k in ("val_auc", "samples_seen")
    }


def test_the_average_of_the_weights_is_what_is_looked_at_and_kept(patches, tmp_path):
    config = dataclasses.replace(TINY, samples=96, evaluate_every=96, average=0.6)
    seen, update = [], runs.Run.update

    def watched(run, optimizer, loss):
        update(run, optimizer, loss)
        seen.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "update", watched)
        train_classifier(config, patches, tmp_path / "run", [], CPU)
    model, _ = train.load_classifier(tmp_path / "run", CPU)
    expected = seen[0]
    for step, weights in enumerate(seen):
        decay = min(0.6, (1 + step) / (10 + step))
        pairs = zip(expected, weights, strict=True) if step else ()
        expected = [decay * a + (1 - decay) * b for a, b in pairs] or weights
        if step == 0:  # the average starts at the first weights, 0.1 of them is left
            start = train.first_weights(config).parameters()
            expected = [0.1 * a.detach() + 0.9 * b for a, b in zip(start, weights, strict=True)]
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_classical_augmentation_is_drawn_anew_for_every_patch_and_keeps_the_lesion():
    x = torch.full((400, 1, 64, 64), -0.5)
    x[:, :, 20:28, 40:48] = 0.5  # off the middle: where it goes tells flip and turn
    made = train.classical(x, np.random.default_rng(0))
    assert torch.equal(made, train.classical(x, np.random.default_rng(0)))
    assert made.shape == x.shape and made.dtype == x.dtype and made.abs().max() <= 1
    assert len(torch.unique(made.flatten(1), dim=0)) == 400
    area = (made > made.amin(dim=(2, 3), keepdim=True) + 0.5).sum(dim=(1, 2, 3)) / 64
    assert area.min() > 0.75 and area.max() < 1.3  # 0.9 ** 2 to 1.1 ** 2, a pixel at the edges
    corner = made.flatten(2).argmax(dim=2)[:, 0]
    quarters = 2 * (corner // 64 >= 32) + (corner % 64 >= 32)
    assert np.bincount(quarters.numpy(), minlength=4).min() > 60  # all places equally often
    air = train.classical(torch.full((50, 1, 8, 8), -1.0), np.random.default_rng(1))
    assert air.max() <= -0.8


def test_augmented_patches_are_those_of_the_plain_run_augmented(patches):
    config = dataclasses.replace(TINY, augment="classical")
    plain = ClassifierBatches(TINY, patches, [], CPU).draw(3)
    drawn = ClassifierBatches(config, patches, [], CPU).draw(3)
    assert torch.equal(plain.y, drawn.y) and not torch.equal(plain.x, drawn.x)
    again = ClassifierBatches(config, patches, [], CPU).draw(3)
    assert torch.equal(drawn.x, again.x)


def test_achieved_synthetic_share_is_logged(finished, patches, sets):
    config = dataclasses.replace(TINY, proportion=0.5)
    _, codes, _, _ = drawn(config, patches, sets)
    shares = [(codes[i : i + 80] >= 6).mean() for i in range(0, 400, 80)]
    assert [row["synthetic_share"] for row in log_of(finished)] == pytest.approx(shares)


def child(config, patches: Path, run: Path, sets: list[Path], cut: tuple) -> None:
    """cut: step, signal and seconds after the step's beginning when it comes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    steps = runs.Run.steps

    def steps_with_cut(run, total, by=1):
        for step in steps(run, total, by):
            if step == cut[0]:
                threading.Timer(cut[2], os.kill, (os.getpid(), cut[1])).start()
            yield step

    runs.Run.steps = steps_with_cut
    try:
        train_classifier(config, patches, run, sets, CPU)
    except KeyboardInterrupt:
        os._exit(3)
    os._exit(0)


def test_killed_and_stopped_at_random_moments_a_run_ends_bitwise_the_same(
    finished, patches, sets, tmp_path
):
    config, run = dataclasses.replace(TINY, proportion=0.5), tmp_path / "run"
    fork = multiprocessing.get_context("fork")
    clock, ended = random.Random(0), []
    for step in (1, 4, 6, 11, 16, 19):  # of 25, a look at the validation set every fifth
        kind = (signal.SIGKILL, signal.SIGTERM)[len(ended) % 2]
        cut = (step, kind, clock.uniform(0, 0.005))
        process = fork.Process(target=child, args=(config, patches, run, sets, cut))
        process.start()
        process.join()
        ended.append(process.exitcode)
    assert sum(code != 0 for code in ended) >= 3, ended
    train_classifier(config, patches, run, sets, CPU)
    one, other = (torch.load(r / "checkpoint.pt", weights_only=True) for r in (run, finished))
    for state in (one, other):  # the moments stand in a list of dictionaries
        state["moments"] = state["optimizer"]["state"].items()
        state["moments"] = {f"{n} {k}": v for n, s in state["moments"] for k, v in s.items()}
    for part in ("model", "average", "moments"):
        assert all(torch.equal(v, other[part][k]) for k, v in one[part].items())
    best = one["best"].pop("weights"), other["best"].pop("weights")
    assert all(torch.equal(v, best[1][k]) for k, v in best[0].items())
    assert (one["best"], one["step"]) == (other["best"], other["step"])
    assert log_of(run) == log_of(finished)
    assert {p.name for p in run.iterdir()} == {p.name for p in finished.iterdir()}


def test_several_processes_are_refused(patches, tmp_path, monkeypatch):
    def enter(run):
        run.processes, run.stack = 2, contextlib.ExitStack()
        return run

    monkeypatch.setattr(runs.Run, "__enter__", enter)
    with pytest.raises(ValueError, match="train-cls: found 2 processes; expected one"):
        train_classifier(TINY, patches, tmp_path / "run", [], CPU)


def test_same_command_again_changes_nothing(finished, patches, sets):
    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    train_classifier(dataclasses.replace(TINY, proportion=0.5), patches, finished, sets, CPU)
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == before


# --- Refusals ---


@pytest.mark.parametrize("split", ["val", "test", "elsewhere"])
def test_synthetic_sets_of_other_than_training_patients_are_refused(patches, tmp_path, split):
    leaking = write_synthetic(tmp_path / "s", patches, "mass", patient=f"patient-{split}")
    config = dataclasses.replace(TINY, proportion=0.5)
    with pytest.raises(ValueError, match="not in train"):
        train_classifier(config, patches, tmp_path / "run", [leaking], CPU)
    assert not list(tmp_path.glob("run/*"))


def test_synthetic_sets_of_unknown_origin_are_refused(patches, tmp_path):
    other = write_patches(tmp_path / "other", n=31)
    foreign = write_synthetic(tmp_path / "s", other, "mass")
    with pytest.raises(ValueError, match="made from another patch set"):
        train_classifier(
            dataclasses.replace(TINY, proportion=0.5), patches, tmp_path / "run", [foreign], CPU
        )


def test_a_control_is_not_mixed_with_sets_of_gans(patches, sets, tmp_path):
    blob = write_synthetic(tmp_path / "blob", patches, "mass", control="blob")
    config = dataclasses.replace(TINY, proportion=0.5)
    with pytest.raises(ValueError, match=r"blob \(blob\), .* \(GAN\); expected sets of GANs or"):
        train_classifier(config, patches, tmp_path / "run", [blob, sets[2]], CPU)


@pytest.mark.parametrize(("proportion", "chosen"), [(0.5, []), (0.5, [2]), (0.0, [0])])
def test_a_proportion_and_lesion_sets_need_each_other(patches, sets, tmp_path, proportion, chosen):
    config = dataclasses.replace(TINY, proportion=proportion)
    with pytest.raises(ValueError, match="--proportion"):
        train_classifier(config, patches, tmp_path / "run", [sets[i] for i in chosen], CPU)


def test_C1_weights_that_cannot_be_had_are_an_error_that_names_the_others(patches, tmp_path):
    missing = dataclasses.replace(TINY, weights=str(tmp_path / "absent.pt"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"absent\.pt"):
        train_classifier(missing, patches, tmp_path / "run", [], CPU)
    narrow = dataclasses.replace(TINY, weights="imagenet")
    with pytest.raises(ValueError, match="--weights none"):
        train_classifier(narrow, patches, tmp_path / "run2", [], CPU)


def test_C1_random_weights_are_said_loudly(patches, tmp_path, capsys):
    config = dataclasses.replace(TINY, samples=32)
    train_classifier(config, patches, tmp_path / "run", [], CPU)
    assert "WARNING: random first weights" in capsys.readouterr().err


def test_warnings_come_once_whatever_number_of_seeds(patches, tmp_path, capsys):
    line = ["train-cls", "--data", patches, "--run", tmp_path / "run", "--preset", "tiny"]
    line += ["--seeds", 2, "--samples", 32, "--evaluate-every", 32, "--width", 8, "--device", "cpu"]
    for _ in range(2):  # each command says it
        mamgan.cli.main([str(part) for part in line], standalone_mode=False)
        assert capsys.readouterr().err.count("WARNING: random first weights") == 1
        shutil.rmtree(tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(patches, tmp_path):
    run, good = tmp_path / "run", dataclasses.replace(TINY, samples=400)
    real, calls = train.F.cross_entropy, []

    def sick(logits, y):
        calls.append(1)
        return real(logits, y) * (float("nan") if len(calls) > 12 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.F, "cross_entropy", sick)
        with pytest.raises(ValueError, match="step 13: loss is nan"):
            train_classifier(good, patches, run, [], CPU)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 10
    train_classifier(good, patches, run, [], CPU)
    assert files.read_json(run / "config.json")["complete"]


def test_reading_ahead_hides_the_time_of_drawing(patches):
    batches = ClassifierBatches(TINY, patches, [], CPU)
    batches.at(0)
    batches.ahead.ahead[1].result()
    start = time.perf_counter()
    again = batches.draw(1)
    drawing = time.perf_counter() - start
    waited = batches.ahead.waited
    x, y, _ = batches.at(1)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    assert batches.ahead.waited - waited < max(drawing, 0.01)
