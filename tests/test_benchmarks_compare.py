"""`python -m benchmarks.compare`: grids of runs, continued and extended."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from runs import assert_fails, eight_images, snapshot, timeless

from benchmarks import arms, configs, loop, records, schedule
from benchmarks.checkpoints import Checkpoints
from benchmarks.compare import main
from benchmarks.comparison import Comparison
from benchmarks.grids import GRIDS, Grid

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPOCHS = 2
RUNS = [(seed, arm) for seed in (43, 44) for arm in ("cal", "tb")]
TINY = Grid(
    dataclasses.replace(
        configs.DIGITS,
        model="resnet8",
        width=0.25,
        subset=64,
        batch_size=32,
        epochs=EPOCHS,
    )
)


@pytest.fixture(scope="module", autouse=True)
def _tiny(tmp_path_factory, quick_compilation):
    """Names a tiny grid, and keeps what is compiled for it."""
    del quick_compilation
    kept = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in kept}
    GRIDS["tiny"] = TINY
    for name, value in kept.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    del GRIDS["tiny"]
    compilation_cache.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def compare(out, *arguments):
    assert main(["tiny", "--out", str(out), "--no-plots", *arguments]) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of two seeds of two arms that nothing interrupted."""
    out = tmp_path_factory.mktemp("comparisons") / "whole"
    compare(out, "--seeds", "2")
    return out


def lines(out):
    """What the runs have written down, but for seconds, by seed, file and arm."""
    return {
        (seed, name, arm): [
            row
            for row in timeless(out / "base" / f"seed{seed}" / name)
            if row["arm"] == arm
        ]
        for seed, arm in RUNS
        for name in ("metrics.jsonl", "layers.jsonl")
    }


def test_each_seed_has_a_run_of_all_arms(whole):
    for seed in (43, 44):
        run = whole / "base" / f"seed{seed}"
        config = json.loads((run / "config.json").read_text())["config"]
        assert (config["seed"], config["arms"]) == (seed, ["cal", "tb"])
        metrics = records.read(run / "metrics.jsonl")
        assert [(row["arm"], row["epoch"]) for row in metrics] == [
            (arm, epoch) for arm in ("cal", "tb") for epoch in (1, 2)
        ]
    losses = {
        key: [row["train_loss"] for row in rows]
        for key, rows in lines(whole).items()
        if key[1] == "metrics.jsonl"
    }
    assert len({tuple(loss) for loss in losses.values()}) == len(RUNS)
    report = (whole / "report.md").read_text()
    assert "TempBalance" in report
    assert "Not finished" not in report


def test_a_finished_comparison_is_left_alone(whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    before = snapshot(out)
    compare(out, "--seeds", "2", "--resume")
    assert snapshot(out) == before


class Killed(BaseException):
    """Ends a command as suddenly as an exception can."""


@pytest.mark.parametrize("at_once", ["1", "2"])
def test_killed_anywhere_it_goes_on_as_if_nothing_had_happened(
    at_once, whole, tmp_path, monkeypatch, capsys
):
    def kill(place):
        def save(self, epochs, state):
            calls.append(epochs)
            if len(calls) == place:
                raise Killed
            real(self, epochs, state)

        calls = []
        monkeypatch.setattr(Checkpoints, "save", save)

    def terminate(self, epochs, state):
        real(self, epochs, state)
        os.kill(os.getpid(), signal.SIGTERM)

    real = Checkpoints.save
    out = tmp_path / "killed"
    arguments = ["--seeds", "2", "--at-once", at_once]
    # Before a checkpoint: the second of the first arm, then of the arm behind it.
    kill(2)
    with pytest.raises(Killed):
        compare(out, *arguments)
    kill(4)
    with pytest.raises(Killed):
        compare(out, *arguments, "--resume")
    monkeypatch.setattr(Checkpoints, "save", terminate)
    capsys.readouterr()
    compare(out, *arguments, "--resume")
    assert "stopped by SIGTERM: base/" in capsys.readouterr().out
    monkeypatch.setattr(Checkpoints, "save", real)
    compare(out, *arguments, "--resume")
    if at_once == "1":
        assert lines(out) == lines(whole)
    else:
        assert_close(lines(out), lines(whole))


def assert_close(found, expected):
    """The same lines; numbers up to the rounding that training has amplified."""
    assert found.keys() == expected.keys()
    for key, rows in found.items():
        assert len(rows) == len(expected[key])
        for row, other in zip(rows, expected[key], strict=True):
            for name in ("train_loss", "test_loss", "alpha", "multiplier"):
                if name in row:
                    np.testing.assert_allclose(row[name], other[name], rtol=1e-3)


def test_two_seeds_at_once_are_as_one_at_a_time(whole, tmp_path):
    compare(tmp_path / "both", "--seeds", "2", "--at-once", "2")
    assert_close(lines(tmp_path / "both"), lines(whole))


def test_seeds_and_arms_can_be_added(whole, tmp_path, compilations):
    out = tmp_path / "grown"
    compare(out, "--seeds", "2", "--arms", "cal")
    # One program for both seeds.
    assert compilations().count("jit(train)") == 1
    old = snapshot(out / "base" / "seed43" / "checkpoints")
    compare(out, "--seeds", "1", "--arms", "tb", "--resume")
    assert lines(out)[44, "metrics.jsonl", "tb"] == []
    report = (out / "report.md").read_text()
    assert f"Not finished: base/tb seed 44 (0 of {EPOCHS} epochs)." in report
    compare(out, "--seeds", "2", "--resume")
    assert lines(out) == lines(whole)
    assert old.items() <= snapshot(out).items()
    content = json.loads((out / "comparison.json").read_text())
    assert (content["arms"], content["seeds"]) == (["cal", "tb"], [43, 44])


def test_all_of_a_seed_comes_before_the_next(tmp_path):
    asked = Comparison(
        tmp_path, "tiny", {"a": TINY.base, "b": TINY.base}, ("cal", "tb"), (1, 2, 3)
    )
    order = [(variant, arm) for variant in "ab" for arm in ("cal", "tb")]
    for at_once, seeds in ((1, [(1,), (2,), (3,)]), (2, [(1, 2), (3,)])):
        assert schedule.groups(asked, at_once) == [
            (*place, together) for together in seeds for place in order
        ]


def first_epoch(arm, **fields):
    """A program, its state and its scores after an epoch of eight images."""
    config = dataclasses.replace(TINY.base, batch_size=4, **fields)
    dataset = eight_images()
    program = loop.make_program(config, arms.ARMS[arm], dataset)
    state = program.start(config.seed)
    if arms.ARMS[arm].balanced:
        state, _ = program.refresh(state)
    train = dataset.parts()["train"]
    [(state, scores)] = program.train((state,), *train, jnp.int32(0))
    return program, state, scores


def test_arms_share_weights_row_order_and_augmentation():
    _, _, plain = first_epoch("cal")
    _, _, balanced = first_epoch("tb", low=1.0, high=1.0)
    np.testing.assert_allclose(balanced.loss, plain.loss, rtol=1e-6)


def test_bfloat16_is_what_training_computes_in_alone():
    program, state, scores = first_epoch("cal", compute="bfloat16")
    other_program, _, other_scores = first_epoch("cal")
    test = eight_images().parts()["test"]
    [tested] = program.evaluate((state,), *test)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, scores, tested)):
        assert leaf.dtype == jnp.float32
    assert scores.loss != other_scores.loss
    np.testing.assert_allclose(scores.loss, other_scores.loss, rtol=0.02)
    # Of the same weights the loss is the same: evaluation is in float32.
    [expected] = other_program.evaluate((state,), *test)
    assert tested.loss == expected.loss


def fails(capsys, arguments, *words):
    assert_fails(main, capsys, arguments, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("unknown", "CONFIG 'unknown' digits cifar10-check"),
        ("tiny --seeds 0", "--seeds 0 below"),
        ("tiny --at-once 0", "--at-once 0 below"),
        ("tiny --arms adam", "--arms 'adam' cal tb"),
        ("tiny --arms tb tb", "--arms once"),
        ("tiny --epochs 0", "--epochs 0 least"),
        ("tiny --compute float16", "--compute 'float16' bfloat16"),
        ("tiny --data-dir .", "--data-dir '.' digits"),
        ("tiny --low 1", "--low"),
    ],
)
def test_bad_arguments(arguments, words, capsys, tmp_path):
    out = tmp_path / "comparison"
    fails(capsys, [*arguments.split(), "--out", str(out)], *words.split())
    assert not out.exists()


def test_nothing_is_overwritten(whole, capsys):
    before = snapshot(whole)
    place = ["--out", str(whole)]
    fails(capsys, ["tiny", *place], str(whole), "--resume", "--out")
    resume = [*place, "--resume"]
    fails(capsys, ["digits", *resume], "CONFIG is 'digits'", "'tiny'", str(whole))
    fails(capsys, ["tiny", "--epochs", "3", *resume], "--epochs is 3", "seed43")
    fails(capsys, ["tiny", "--compute", "bfloat16", *resume], "--compute", "seed43")
    run = str(whole / "base" / "seed43")
    fails(capsys, ["tiny", "--out", run, "--resume"], "comparison.json", "--out")
    assert snapshot(whole) == before


def test_damaged_comparisons(whole, capsys, tmp_path):
    out = tmp_path / "damaged"
    shutil.copytree(whole, out)
    command = ["tiny", "--seeds", "3", "--out", str(out), "--resume"]
    config = out / "base" / "seed44" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"data_sha256": "0"}))
    before = snapshot(out)
    fails(capsys, command, "data", "seed44")
    assert snapshot(out) == before
    for text in ("{", "[]", '{"name": "tiny"}'):
        (out / "comparison.json").write_text(text)
        fails(capsys, command, "comparison.json is damaged")
