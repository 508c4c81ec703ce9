"""`python -m benchmarks.train`: results, resuming after a kill, faults of the user."""

import builtins
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from runs import EPOCHS, TINY, assert_fails, assert_same_run, final_state, snapshot

from benchmarks import arms, configs, data, loop, records
from benchmarks.checkpoints import newest
from benchmarks.train import main

PICTURES = ["alpha.png", "esd.png", "multipliers.png", "overview.png"]


def test_a_run_leaves_its_records(finished):
    config = json.loads((finished / "config.json").read_text())["config"]
    assert config["epochs"] == EPOCHS
    assert config["arms"] == ["cal", "tb"]
    metrics = records.read(finished / "metrics.jsonl")
    assert [(row["arm"], row["epoch"]) for row in metrics] == [
        (arm, epoch) for arm in ("cal", "tb") for epoch in (1, 2, 3)
    ]
    rates = [row["learning_rate"] for row in metrics[:3]]
    np.testing.assert_allclose(rates, [0.1, 0.075, 0.025], rtol=1e-6)
    assert all((row["analysis_seconds"] > 0) == (row["arm"] == "tb") for row in metrics)
    layers = records.read(finished / "layers.jsonl")
    # Six 3x3 convolutions and two shortcuts, before each epoch and behind the last.
    assert len(layers) == 2 * 8 * (EPOCHS + 1)
    initial = [row for row in layers if row["epoch"] == 0]
    alpha = {(row["arm"], row["layer"]): row["alpha"] for row in initial}
    assert all(alpha["cal", row["layer"]] == row["alpha"] for row in initial)
    tuned = [row["multiplier"] for row in layers if row["arm"] == "tb" and row["tuned"]]
    assert (min(tuned), max(tuned)) == (0.5, 1.5)
    assert {row["multiplier"] for row in layers if row["arm"] == "cal"} == {1.0}
    table = (finished / "table.md").read_text()
    assert "TempBalance" in table
    assert "blocks/2/shortcut/conv1" in table


def test_a_run_leaves_pictures(finished):
    assert sorted(path.name for path in finished.glob("*.png")) == PICTURES
    for name in PICTURES:
        content = (finished / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 20_000


def test_arms_differ_only_in_the_multipliers(finished):
    cal, tb = (final_state(finished, arm) for arm in ("cal", "tb"))
    assert not np.array_equal(
        cal.params["conv1"]["kernel"], tb.params["conv1"]["kernel"]
    )
    config = configs.parse(TINY).config
    dataset = data.load(config)
    programs = [
        loop.make_program(config, arms.ARMS[arm], dataset) for arm in config.arms
    ]
    starts = [jax.device_get(program.start(config.seed).params) for program in programs]
    jax.tree.map(np.testing.assert_array_equal, *starts)


def test_resume_after_a_kill_gives_the_same_bits(finished, start_run, tmp_path):
    out = tmp_path / "killed"
    process = start_run(out)
    # A line is written before its checkpoint, so the kill falls between the two or
    # somewhat later.
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if len(records.read(out / "metrics.jsonl")) >= EPOCHS + 1:
            break
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert newest(out / "checkpoints" / "cal") == EPOCHS
    assert newest(out / "checkpoints" / "tb") < EPOCHS
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"arm": "tb", "epo')
    with (out / "layers.jsonl").open("a") as file:
        file.write('{"arm": "tb", "epoch": 3}\n')
    resumed = start_run(out)
    resumed.communicate(timeout=300)
    assert resumed.returncode == 0
    assert_same_run(out, finished)


def test_resuming_a_finished_run_changes_nothing_but_its_pictures(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    for name in PICTURES:
        (out / name).unlink()
    names = ("config.json", "metrics.jsonl", "layers.jsonl", "table.md")
    before = {name: (out / name).read_bytes() for name in names}
    assert main([*TINY, "--out", str(out), "--resume"]) == 0
    assert {name: (out / name).read_bytes() for name in names} == before
    assert sorted(path.name for path in out.glob("*.png")) == PICTURES


def fails(capsys, arguments, *words):
    assert_fails(main, capsys, arguments, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--epochs x", "--epochs 'x'"),
        ("--epochs 0", "--epochs 0 least"),
        ("--dataset mnist", "--dataset 'mnist' digits cifar10"),
        ("--model resnet1", "--model 'resnet1' resnet8"),
        ("--arms adam", "--arms 'adam' cal tb"),
        ("--arms tb tb", "--arms once"),
        ("--width 0", "--width 0.0 above"),
        ("--learning-rate nan", "--learning-rate nan finite"),
        ("--momentum 1", "--momentum 1.0 below"),
        ("--low -1", "--low -1.0 least"),
        ("--snr -1", "--snr -1.0 least"),
        ("--metric beta", "--metric 'beta' alpha_hat spectral_norm"),
        ("--fit mean", "--fit 'mean' median min_ks peak"),
        ("--init keras", "--init 'keras' flax torch"),
        ("--high inf", "--high inf finite"),
        ("--interval 0", "--interval 0 least"),
        ("--seed -1", "--seed -1 4294967295"),
        ("--weight-decay -1", "--weight-decay -1.0 least"),
        ("--subset 2000", "--subset 2000 1437"),
        ("--subset 10", "--batch-size 64 10"),
        ("--validation 0", "--validation 0 least"),
        ("--validation 1374", "--validation 1374 1373"),
        ("--subset 1400 --validation 38", "--validation 38 37"),
        ("--data-dir .", "--data-dir '.' digits"),
        ("--dataset cifar10 --data-dir /nowhere", "--data-dir '/nowhere'"),
        ("--unknown 3", "--unknown"),
    ],
)
def test_bad_arguments(arguments, words, capsys, tmp_path):
    out = tmp_path / "run"
    fails(capsys, [*arguments.split(), "--out", str(out)], *words.split())
    assert not out.exists()


def test_nothing_is_overwritten(finished, capsys):
    before = snapshot(finished)
    fails(capsys, [*TINY, "--out", str(finished)], str(finished), "--resume", "--out")
    resume = ["--out", str(finished), "--resume"]
    for option, value in (("--epochs", "4"), ("--low", "0.6"), ("--arms", "tb")):
        fails(capsys, [*TINY, option, value, *resume], f"{option} is", str(finished))
    fails(capsys, [*TINY, "--out", str(finished / "config.json")], "no directory")
    fails(capsys, [*TINY, "--out", str(finished / "checkpoints"), "--resume"], "no run")
    fails(capsys, [*TINY, "--out", str(finished / "config.json" / "run")])
    assert snapshot(finished) == before


def cut_config(path):
    (path / "config.json").write_text('{"config": {')


def empty_config(path):
    (path / "config.json").write_text("{}")


def lose_field(path):
    content = json.loads((path / "config.json").read_text())
    del content["config"]["epochs"]
    (path / "config.json").write_text(json.dumps(content))


def other_data(path):
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"data_sha256": "0"}))


def cut_checkpoint(path):
    files = [file for file in (path / "checkpoints").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])


def cut_metrics(path):
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[1:]))


def lose_layers(path):
    (path / "layers.jsonl").unlink()


def spoil_layers(path):
    lines = (path / "layers.jsonl").read_text().splitlines(keepends=True)
    (path / "layers.jsonl").write_text("".join(["[]\n", *lines]))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_config, "config.json damaged"),
        (empty_config, "config.json damaged 'config'"),
        (lose_field, "config.json field 'epochs'"),
        (other_data, "data"),
        (cut_checkpoint, "checkpoint cannot be restored"),
        (cut_metrics, "metrics.jsonl lacks epoch 1 of cal"),
        (lose_layers, "layers.jsonl lacks epoch 0 of cal"),
        (spoil_layers, "layers.jsonl damaged line 1"),
    ],
)
def test_damaged_runs(damage, words, finished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    damage(out)
    before = snapshot(out)
    monkeypatch.setattr("tqdm.tqdm", Silent)
    fails(capsys, [*TINY, "--out", str(out), "--resume"], *words.split())
    assert snapshot(out) == before


class Silent:
    """A progress bar that shows nothing."""

    def __init__(self, **options):
        del options

    def __enter__(self):
        return self

    def __exit__(self, *error):
        del error

    def update(self, count=1):
        """Takes note of nothing."""

    set_description = set_postfix_str = update


def test_a_missing_package_is_named(monkeypatch, capsys):
    def without(name, *args):
        if name.startswith("tqdm"):
            message = "No module named 'tqdm'"
            raise ModuleNotFoundError(message, name="tqdm")
        return real(name, *args)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    fails(capsys, [], "tqdm", "pip install")
