"""The command line: what users type, what they read when something is wrong."""

import csv
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed.run as torchrun
from click.testing import CliRunner

import mamgan
from benchmarks import bench_memory
from support import files, patchset, phantom, sources
from support.derived import write_png16

ROOT = Path(mamgan.__file__).parent
HEAR = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # not so behind a "&"
TRAIN_GAN = ("train-gan", "--task", "mass", "--data", "d", "--run", "r")
COMMANDS = ("prepare", "train-gan", "synthesize", "train-cls", "evaluate", "demo")


def run(*arguments: object):
    return CliRunner().invoke(mamgan.cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return phantom.write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", patients=8)


@pytest.fixture(scope="module")
def patches(manifest, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("patches") / "set"
    held = ("train/normal", "train/malignant_mass", "train/malignant_calcification")
    counts = [f"--count={key}=16" for key in (*held, "val/normal", "val/malignant_mass")]
    result = run("prepare", manifest, "--out", out, "--preset", "tiny", "--seed", 1, *counts)
    assert result.exit_code == 0, result.output
    return out


def test_help_lists_the_six_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"  {command} " in result.output for command in COMMANDS)
    assert "not for clinical use" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_states_defaults(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--seed" in result.output
    assert "[default: 0; x>=0]" in " ".join(result.output.split())


def test_help_states_the_value_of_every_preset():
    text = " ".join(run("train-gan", "--help").output.split())
    assert "(T1). [paper 1e-05, cbis 0.0002, cbis-cpu 0.0002, tiny 0.0002]" in text


def test_the_torchrun_line_of_the_help_leaves_our_options_to_us():
    text = " ".join(run("train-gan", "--help").output.split())
    line = "torchrun --nproc-per-node N -- mamgan.py train-gan"
    assert line in text and line in (ROOT / "README.md").read_text()
    found = torchrun.parse_args([*line.replace("N", "2").split()[1:], "--run", "RUN"])
    assert (found.nproc_per_node, found.training_script) == ("2", "mamgan.py")
    assert found.training_script_args == ["train-gan", "--run", "RUN"]


def test_a_card_that_is_too_small_is_told_what_to_lower_to_what(monkeypatch):
    said = "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has 12.00 GiB. Process 1 has"
    monkeypatch.setattr(mamgan.train, "train_gan", Mock(side_effect=torch.OutOfMemoryError(said)))
    result = run(*TRAIN_GAN)
    assert result.exit_code == 1
    start = "Error: CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has 12.00 GiB. train-gan"
    assert result.output.startswith(start) and result.output.count("\n") == 1

    def card(config, *more) -> float:
        """GiB by arithmetic with what an H100 took beyond it, for kernels and CUDA itself."""
        measure = bench_memory.classifier if "samples" in vars(config) else bench_memory.gan
        return 1.52 * measure(config, *more)["in all"] / 2**30 + 0.5

    gan, cls = mamgan.train.GAN_PRESETS["paper"], mamgan.train.CLASSIFIER_PRESETS["paper"]
    assert f"takes {round(card(gan, 8, True))} GiB:" in result.output
    assert f"takes {round(card(cls, cls.batch_size, 256, True))}." in result.output
    for gigabytes, batch in ((12, 4), (8, 2)):
        assert f"on {gigabytes} GB" in result.output and f" {batch}," in result.output
        assert card(gan, batch, True) * 1.074 < gigabytes
    assert card(gan, 8, True) * 1.074 > 11.5  # too close to 12


@pytest.mark.parametrize(
    "arguments",
    [
        ("prepare",),
        ("train-gan", "--task", "cyst", "--data", "d", "--run", "r"),
        (*TRAIN_GAN, "--iters-fade", "0", "--iters-final", "0"),
        ("synthesize", "--gan", "g", "--out", "o"),
        ("synthesize", "--gan", "g", "--out", "o", "--data", "d", "--lesions", "2"),
        ("synthesize", "--gan", "g", "--out", "o", "--image", "i", "-n", "2"),
        ("train-cls", "--data", "d", "--run", "r", "--proportion", "1.5"),
        ("prepare", "m.csv", "--out", "o", "--birads-as-pathology"),
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    assert run(*arguments).exit_code == 2


def message(result) -> str:
    """The one clear message of a failed command."""
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    (line,) = [x for x in result.output.splitlines() if x.startswith("Error: ")]
    return line


def test_missing_and_unreadable_manifests_are_one_message(tmp_path):
    absent = run("prepare", tmp_path / "absent.csv", "--out", tmp_path / "out")
    assert "absent.csv" in message(absent)
    (tmp_path / "odd.csv").write_bytes(b"\xff\xfe\x00odd")
    assert "odd.csv" in message(run("prepare", tmp_path / "odd.csv", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_ids_that_look_alike_stop_prepare_unless_they_are_said_to_differ(manifest, tmp_path):
    text = manifest.read_text().replace(",P0001,", ",P1,").replace(",P0000,", ",p01,")
    other = manifest.parent / "other.csv"
    other.write_text(text)
    line = ("prepare", other, "--out", tmp_path / "out", "--preset", "tiny")
    line += ("--count=train/normal=6",)
    assert "'P1', 'p01' look alike; write" in message(run(*line))
    assert not (tmp_path / "out").exists()
    assert run(*line, "--distinct-ids").exit_code == 0
    splits = (tmp_path / "out/splits.csv").read_text()
    assert "P1," in splits and "p01," in splits
    assert "distinct" not in (tmp_path / "out/config.json").read_text()


def test_a_folder_that_is_no_patch_set_is_one_message(tmp_path):
    (tmp_path / "empty").mkdir()
    for command in (
        ("train-gan", "--task", "mass", "--run", tmp_path / "run", "--preset", "tiny"),
        ("train-cls", "--run", tmp_path / "run", "--preset", "tiny"),
        ("synthesize", "--gan", tmp_path / "empty", "--out", tmp_path / "run"),
        ("evaluate", "--baseline", tmp_path / "empty", "--out", tmp_path / "run"),
    ):
        assert "empty" in message(run(*command, "--data", tmp_path / "empty"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line", ["", "--data d", "--baseline b", "--folds f --baseline b"])
def test_evaluate_takes_one_patch_set_and_its_baseline_or_folds(line):
    found = run("evaluate", "--out", "o", *line.split())
    assert found.exit_code == 2 and "give --data and --baseline, or --folds alone" in found.output


def test_a_run_folder_made_with_other_options_is_refused_by_name(patches, tmp_path):
    line = ("train-cls", "--data", patches, "--preset", "tiny", "--run", tmp_path / "run")
    short = ("--samples", "8", "--batch-size", "4", "--width", "8", "--device", "cpu")
    assert run(*line, *short).exit_code == 0
    assert "decay: 0.9 there, 0.5 now" in message(run(*line, *short, "--decay", "0.5"))
    assert "complete already" in run(*line, *short).output
    mixed = run(*line, *short, "--seeds", "2")
    assert mixed.exit_code == 2 and "holds one run" in mixed.output
    (tmp_path / "several" / "seed-0").mkdir(parents=True)
    mixed = run(*line[:-1], tmp_path / "several", *short)
    assert mixed.exit_code == 2 and "several --seeds" in mixed.output


def test_width_is_refused_where_the_network_is_the_papers(patches, tmp_path):
    line = ("train-cls", "--data", patches, "--run", tmp_path / "run", "--width", "8")
    found = run(*line, "--preset", "cbis", "--weights", "none", "--device", "cpu")
    assert found.exit_code == 2 and "--width belongs to the small network" in found.output
    narrow = run(*line[:-1], "4", "--preset", "tiny", "--device", "cpu")
    assert narrow.exit_code == 2 and "--width 4: expected 8 or more" in narrow.output
    assert not (tmp_path / "run").exists()


def test_a_patch_set_of_another_size_names_both(patches, tmp_path):
    found = message(run("train-gan", "--task", "mass", "--data", patches, "--run", tmp_path / "r"))
    assert "64 px" in found
    assert "256 px" in found
    line = ("train-cls", "--data", patches, "--run", tmp_path / "r", "--weights", "absent")
    assert "64 px patches with the preset paper, which is for 256 px" in run(*line).output


def test_a_folder_that_cannot_be_written_is_one_message(manifest, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in message(run("prepare", manifest, "--out", tmp_path / "file" / "out"))


def test_no_space_left_says_what_to_do():
    error = OSError(28, "No space left on device", "/data/patches")
    assert mamgan._one_line(error) == (
        "/data/patches: No space left on device; free some space, then run it again"
    )


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_soon_says_how_to_go_on_and_the_same_command_does(manifest, tmp_path, kind):
    line = [sys.executable, ROOT / "mamgan.py", "prepare", manifest, "--out", tmp_path / "out"]
    line += ["--preset", "tiny", "--workers", "1"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=HEAR)
    while not (tmp_path / "out" / "config.json").exists():
        time.sleep(0.05)
    process.send_signal(kind)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped; the same command goes on from here" in text
    assert files.read_json(tmp_path / "out" / "config.json")["complete"] is False
    with pytest.raises(ValueError, match="not finished"):
        patchset.patch_config(tmp_path / "out")
    assert run(*line[2:]).exit_code == 0


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_libraries_are_loaded_is_no_traceback(tmp_path, kind):
    line = [sys.executable, "mamgan.py", "prepare", "m.csv", "--out", tmp_path / "out"]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=HEAR)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(kind)
    assert process.communicate() == (None, "") and process.returncode == -kind


def test_file_names_with_spaces_quotes_newlines_and_leading_dashes_work(tmp_path):
    folder = tmp_path / "a folder, 'quoted'\n-and odd"
    folder.mkdir()
    display, _, _ = phantom.render(0, 0, "L", "CC")
    name = '-P1 "ä";\nCC.png'
    write_png16(folder / name, (np.clip(display, 0, 1) * 65535).astype(np.uint16), "phantom")
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(sources.MANIFEST_COLUMNS)
        writer.writerow([name, "P1", "L", "CC", "", "normal", "", "", "", ""])
    found = sources.read_manifest(folder / "manifest.csv")
    assert os.path.samefile(found[0].image_path, folder / name)


def test_table_is_printed_with_intervals_and_reasons(tmp_path, capsys):
    base = {"regime": "Baseline", "auc": 0.8, "low": 0.7, "high": 0.9}
    empty = ("delta", "delta_low", "delta_high", "p_delong", "p_clustered", "detectable")
    base |= dict.fromkeys(empty)
    more = {"regime": "50% w/ decay", "auc": 0.82, "low": 0.72, "high": 0.92, "delta": 0.02}
    more |= {"delta_low": -0.01, "delta_high": 0.05, "p_delong": 0.03, "p_clustered": 0.2}
    more["detectable"] = 0.0414
    mamgan.print_table([base, more], tmp_path)
    text = capsys.readouterr().out
    assert "0.820 (0.720 to 0.920)" in text
    assert "+0.020 (-0.010 to +0.050)" in text
    assert str(tmp_path / "report.html") in text
    header, *lines, _ = text.splitlines()
    assert [line[header.index("detectable") :] for line in lines] == ["-", "0.041"]


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("train-gan", "--gp-noise", "foo"),
        ("train-gan", "--g-average", "2"),
        ("train-gan", "--save-every", "0"),
        ("train-gan", "--iters-final", "-3"),
        ("train-gan", "--seed", "-1"),
        ("train-cls", "--samples", "0"),
        ("train-cls", "--decay-every", "0"),
        ("prepare", "--spacing-mm", "-1"),
    ],
)
def test_options_out_of_range_are_named_before_anything_is_read(command, option, value):
    result = run(command, option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output
