"""`benchmarks.train` and `benchmarks.compare`: results, kills, damage, arguments."""

import contextlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from runs import (
    CONFIG,
    EPOCHS,
    TINY,
    Killed,
    assert_fails,
    assert_same_runs,
    final_state,
    keep_programs,
    program_of,
    record,
    snapshot,
    timeless,
)

from benchmarks import compare, data, experiments, files, models, plots, train
from benchmarks.errors import UserError
from benchmarks.experiments import Experiment, unfinished
from benchmarks.files import read_json, read_lines
from benchmarks.grids import GRIDS, Grid
from benchmarks.runs import LAYERS, METRICS, RECORD, Run

ROOT = Path(__file__).parents[1]
ARMS, SEEDS = ("cal", "tb"), (43, 44)
PICTURES = ["alpha.png", "cal.png", "tb.png"]


@pytest.fixture(scope="module", autouse=True)
def programs():
    """The seed and arm of every call for a program; names a tiny grid."""
    GRIDS["tiny"] = Grid(CONFIG)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plots, "DPI", 40)
        monkeypatch.setattr(experiments, "PAUSE", 0)
        yield keep_programs(monkeypatch)
    del GRIDS["tiny"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of `benchmarks.train` with two arms that nothing interrupted."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main([*TINY, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of `benchmarks.compare` with two arms and two seeds."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    compared(path, "--seeds", "2")
    return path


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the directory of a training, to damage."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def trained(out, *arguments):
    assert train.main([*TINY, "--no-plots", "--out", str(out), *arguments]) == 0


def compared(out, *arguments):
    assert compare.main(["tiny", "--no-plots", "--out", str(out), *arguments]) == 0


def of_comparison(out, arms=ARMS):
    """What the runs of a comparison have written, by seed, arm, and table."""
    return {
        (seed, arm, name): timeless(record(out / "base" / f"seed{seed}" / arm)[name])
        for seed, arm, name in itertools.product(SEEDS, arms, (METRICS, LAYERS))
    }


# --- what is left behind a command ----------------------------------------------------


def test_a_training_leaves_its_records(finished):
    for arm in ARMS:
        written = record(finished / arm)
        assert (written["config"]["arm"], written["epochs"]) == (arm, EPOCHS)
        metrics = written[METRICS]
        assert [row["epoch"] for row in metrics] == [1, 2, 3]
        rates = [row["learning_rate"] for row in metrics]
        np.testing.assert_allclose(rates, [0.1, 0.075, 0.025], rtol=1e-6)
        for row in metrics:
            assert (row["analysis_seconds"] > 0) == (arm == "tb")
    cal, tb = (record(finished / arm)[LAYERS] for arm in ARMS)
    # Two convolutions, before each epoch and after the last.
    assert len(cal) == len(tb) == 2 * (EPOCHS + 1)
    assert [row["alpha"] for row in cal[:2]] == [row["alpha"] for row in tb[:2]]
    tuned = [row["multiplier"] for row in tb if row["tuned"]]
    assert (min(tuned), max(tuned)) == (0.5, 1.5)
    assert {row["multiplier"] for row in cal} == {1.0}
    tables = (finished / "table.md").read_text()
    assert "tb (TempBalance)" in tables
    assert "blocks/0/conv2" in tables
    assert sorted(path.name for path in finished.glob("*.png")) == PICTURES
    for name in PICTURES:
        content = (finished / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5_000


def test_a_comparison_has_a_run_of_each_seed_and_arm(whole, finished):
    lines = of_comparison(whole)
    losses = [
        tuple(row["train_loss"] for row in rows)
        for (_, _, name), rows in lines.items()
        if name == METRICS
    ]
    assert len(set(losses)) == len(losses) == 4
    for arm in ARMS:
        for name in (METRICS, LAYERS):
            assert lines[43, arm, name] == timeless(record(finished / arm)[name])
    report = (whole / "report.md").read_text()
    assert "TempBalance" in report
    assert "Not finished" not in report


def test_resuming_what_is_finished_changes_nothing_but_pictures(copy, whole):
    for name in PICTURES:
        (copy / name).unlink()
    before = snapshot(copy)
    assert train.main([*TINY, "--out", str(copy), "--resume"]) == 0
    after = snapshot(copy)
    assert {name: after[name] for name in before} == before
    assert sorted(path.name for path in after.keys() - before) == PICTURES
    before = snapshot(whole)
    compared(whole, "--seeds", "2", "--resume")
    assert snapshot(whole) == before


def test_seeds_and_arms_can_be_added(whole, tmp_path, programs):
    out = tmp_path / "grown"
    programs.clear()
    compared(out, "--seeds", "2", "--arms", "cal")
    assert programs == [(43, "cal")]  # It serves both seeds.
    old = snapshot(out / "base")
    compared(out, "--seeds", "1", "--arms", "tb", "--resume")
    report = (out / "report.md").read_text()
    assert f"Not finished: base/tb seed 44 (0 of {EPOCHS} epochs)." in report
    compared(out, "--seeds", "2", "--resume")
    assert of_comparison(out) == of_comparison(whole)
    assert old.items() <= snapshot(out / "base").items()
    content = read_json(out / "experiment.json")
    assert (content["arms"], content["seeds"]) == (["cal", "tb"], [43, 44])


def test_all_of_a_seed_comes_before_the_next(tmp_path):
    configs = {"a": CONFIG, "b": CONFIG}
    runs = Experiment(tmp_path, "tiny", configs, ARMS, (1, 2, 3)).runs()
    order = [(variant, arm) for variant in "ab" for arm in ARMS]
    for at_once, parts in ((1, [(1,), (2,), (3,)]), (2, [(1, 2), (3,)])):
        found = [
            (group[0].variant, group[0].arm, tuple(run.config.seed for run in group))
            for group in unfinished(runs, at_once)
        ]
        assert found == [(*place, seeds) for seeds in parts for place in order]


# --- rows held out --------------------------------------------------------------------


def test_rows_held_out_are_scored_and_change_no_training(finished, tmp_path):
    out = tmp_path / "held_out"
    arguments = [*TINY, "--arms", "cal", "--validation", "70", "--no-plots"]
    assert train.main([*arguments, "--out", str(out)]) == 0
    run, rows = Run(out / "cal", CONFIG, "cal"), timeless(record(out / "cal")[METRICS])
    dataset, state = data.load(train.parse(arguments).config), final_state(run)
    model = models.build(
        "resnet4", num_classes=10, width=0.5, image_channels=1, rngs=nnx.Rngs(0)
    )
    nnx.update(model, state.params)
    nnx.update(model, state.batch_stats)
    images = dataset.preparation.normalize(jnp.asarray(dataset.parts["validation"][0]))
    logits = jax.jit(lambda images: model(images, train=False))(images)
    logits = np.asarray(logits, np.float64)
    labels = dataset.parts["validation"][1]
    chosen = logits[np.arange(len(labels)), labels]
    loss = np.mean(np.log(np.exp(logits).sum(1)) - chosen)
    accuracy = np.mean(logits.argmax(1) == labels)
    assert rows[-1]["validation_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert rows[-1]["validation_loss"] == pytest.approx(loss, rel=1e-4)
    own = ("validation_loss", "validation_accuracy")
    shared = [{key: row[key] for key in row if key not in own} for row in rows]
    assert shared == timeless(record(finished / "cal")[METRICS])
    plain = final_state(Run(finished / "cal", CONFIG, "cal"))
    jax.tree.map(np.testing.assert_array_equal, state, plain)
    tables = (out / "table.md").read_text(), (finished / "table.md").read_text()
    assert ["| selected" in table for table in tables] == [True, False]


# --- kills ----------------------------------------------------------------------------


def kill_at_write(monkeypatch, number):
    """Kills the command right before or right after a write: two numbers for each."""
    kills = itertools.count(1)

    def mortal(place, name):
        def write(*arguments, **options):
            if next(kills) == number:
                raise Killed
            result = real(*arguments, **options)
            if next(kills) == number:
                raise Killed
            return result

        real = getattr(place, name)
        monkeypatch.setattr(place, name, write)

    mortal(os, "replace")
    mortal(ocp.CheckpointManager, "save")
    mortal(ocp.CheckpointManager, "delete")


def test_killed_at_any_write_it_ends_with_the_same_bits(finished, tmp_path):
    out = tmp_path / "killed"
    for number in itertools.count(1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill_at_write(monkeypatch, number)
            with contextlib.suppress(Killed):
                trained(out, "--resume")
                break
    assert number > 10
    assert_same_runs(out, finished, *ARMS)


def in_a_process(out):
    program = "import sys; from benchmarks import experiments, train; "
    program += "experiments.PAUSE = 0; sys.exit(train.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *TINY, "--arms", "tb"]
    return subprocess.Popen(
        [*command, "--resume", "--no-plots", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    "kills", [1, pytest.param(20, marks=pytest.mark.long)], ids=str
)
def test_a_killed_process_goes_on_as_if_nothing_had_happened(kills, finished, tmp_path):
    def saved():
        return Run(out / "tb", CONFIG, "tb").done()

    rng, out, done = random.Random(0), tmp_path / "0", 0
    while done < kills:
        process, before = in_a_process(out), saved()
        while process.poll() is None and saved() == before:
            time.sleep(0.002)
        # A checkpoint of this run takes some hundredths of a second.
        time.sleep(0.1 * rng.random() * (kills > 1))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            out = tmp_path / str(done)
        else:
            done += 1
    trained(out, "--arms", "tb", "--resume")
    assert_same_runs(out, finished, "tb")


@pytest.mark.parametrize("at_once", ["1", "2"])
def test_sigterm_saves_the_epoch(at_once, whole, tmp_path, monkeypatch, capsys):
    def terminate(self, *arguments, **options):
        real(self, *arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    out, real = tmp_path / "terminated", ocp.CheckpointManager.save
    arguments = ["--seeds", "2", "--arms", "tb", "--at-once", at_once, "--resume"]
    monkeypatch.setattr(ocp.CheckpointManager, "save", terminate)
    for epoch in (1, 2):
        capsys.readouterr()
        compared(out, *arguments)
        seeds = "43" if at_once == "1" else "43+44"
        saved = f"base/tb seed {seeds} is saved after {epoch} of {EPOCHS} epochs"
        message = f"stopped by SIGTERM: {saved}; continue with --resume\n"
        assert capsys.readouterr().out == message
    monkeypatch.setattr(ocp.CheckpointManager, "save", real)
    compared(out, *arguments)
    found, expected = of_comparison(out, ["tb"]), of_comparison(whole)
    for place, rows in found.items():
        for row, other in zip(rows, expected[place], strict=True):
            if at_once == "1":
                assert row == other
            for column in {"train_loss", "test_loss", "alpha", "multiplier"} & set(row):
                # Up to rounding, which training has amplified.
                assert row[column] == pytest.approx(other[column], rel=1e-3)


# --- damaged files --------------------------------------------------------------------


class Bait:
    """An object that tells on whoever unpickles it."""

    def __reduce__(self):
        return explode, ()


def explode():
    raise AssertionError


def damages(content, rng):
    """Cut, emptied, filled with noise, with one byte changed, and a pickle."""
    yield content[: rng.randrange(len(content.removesuffix(b"\n")))]
    yield b""
    yield rng.randbytes(len(content))
    place = rng.randrange(len(content))
    yield content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
    yield pickle.dumps(Bait())


def read_run(run, program):
    """Reads everything that resuming reads."""
    run.check()
    with run.session(program):
        pass


@pytest.mark.parametrize(
    "kinds", [1, pytest.param(5, marks=pytest.mark.long)], ids=["one kind", "all kinds"]
)
def test_every_damaged_file_is_found(kinds, copy):
    """Each file is damaged in one way, of five in turn, or in all of them."""
    rng, cases = random.Random(0), 0
    run, path, program = Run(copy / "tb", CONFIG, "tb"), copy / "tb", program_of("tb")
    read_run(run, program)
    paths = [file for file in sorted(path.rglob("*")) if file.is_file()]
    for number, file in enumerate(file for file in paths if file.stat().st_size):
        content = file.read_bytes()
        for damaged in ([*damages(content, rng)] * 2)[number % 5 : number % 5 + kinds]:
            file.write_bytes(damaged)
            with pytest.raises(UserError, match="damaged") as raised:
                read_run(run, program)
            assert "\n" not in str(raised.value)
            assert str(path) in str(raised.value)
            cases += 1
        file.write_bytes(content)
    # Well-formed, but not what was saved.
    file, content = path / RECORD, record(path)
    for name in (METRICS, LAYERS):
        for count in range(len(content[name])):
            file.write_text(json.dumps(content | {name: content[name][:count]}))
            with pytest.raises(UserError, match=f"{RECORD} is damaged"):
                run.check()
    assert cases >= 10 * kinds


def lose_field(file):
    content = record(file.parent)
    del content["config"]["epochs"]
    Run(file.parent, CONFIG, "tb").write(content)


def other_data(file):
    content = record(file.parent) | {"data_sha256": "0"}
    Run(file.parent, CONFIG, "tb").write(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def replace_by_a_file(directory):
    shutil.rmtree(directory)
    directory.write_bytes(b"no directory")


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (cut, "experiment.json", "experiment.json damaged"),
        (cut, "tb/run.json", "run.json damaged"),
        (lambda file: file.write_text("{}"), "tb/run.json", "damaged 'config'"),
        (lambda file: file.write_text("[]"), "tb/run.json", "run.json damaged"),
        (lose_field, "tb/run.json", "run.json field 'epochs'"),
        (other_data, "tb/run.json", "data"),
        (Path.unlink, "tb/run.json", "holds no run"),
        (cut, f"tb/checkpoints/{EPOCHS}/default/_METADATA", "checkpoints damaged"),
        (replace_by_a_file, f"tb/checkpoints/{EPOCHS}", "checkpoints damaged"),
        (shutil.rmtree, f"tb/checkpoints/{EPOCHS}", "checkpoints gone"),
    ],
)
def test_damage_is_one_line(damage, name, words, copy, capsys):
    damage(copy / name)
    before = snapshot(copy)
    arguments = [*TINY, "--no-plots", "--out", str(copy), "--resume"]
    assert_fails(train.main, capsys, arguments, str(copy), *words.split())
    assert snapshot(copy) == before


def test_lines_that_are_no_rows_are_named(tmp_path):
    for line in (b"[]", b"3", b"nothing", b"\xff"):
        (tmp_path / "lines").write_bytes(b'{"epoch": 1}\n' + line + b"\n")
        with pytest.raises(UserError, match="lines is damaged in line 2"):
            read_lines(tmp_path / "lines")


def test_what_is_not_finite_is_null():
    row = {"loss": float("nan"), "alpha": float("inf"), "epoch": 1}
    assert files.finite(row) == {"loss": None, "alpha": None, "epoch": 1}


# --- faults of the user ---------------------------------------------------------------


def test_nothing_is_overwritten(finished, whole, capsys):
    def fails(main, out, arguments, *words):
        assert_fails(main, capsys, [*arguments, "--out", str(out)], *words)

    before = snapshot(finished), snapshot(whole)
    fails(train.main, finished, TINY, str(finished), "--resume", "--out")
    resume = [*TINY, "--resume"]
    for option, value in (("--epochs", "4"), ("--low", "0.6"), ("--validation", "9")):
        words = f"{option} is {value}", str(finished)
        fails(train.main, finished, [*resume, option, value], *words)
    fails(train.main, finished / "table.md", TINY, "no directory")
    fails(train.main, finished / "tb", resume, "holds no run")
    fails(train.main, finished / "table.md" / "run", TINY)
    resume = ["tiny", "--resume"]
    fails(compare.main, whole, ["tiny"], str(whole), "--resume")
    fails(compare.main, whole, ["digits", "--resume"], "'tiny', not 'digits'")
    fails(compare.main, whole, [*resume, "--epochs", "4"], "--epochs is 4", "seed43")
    fails(compare.main, whole, [*resume, "--compute", "bfloat16"], "--compute", "seed")
    fails(compare.main, finished, resume, "'train', not 'tiny'")
    assert (snapshot(finished), snapshot(whole)) == before


COUNTS = ("epochs", "interval", "validation")
NOT_NEGATIVE = ("low", "snr", "weight-decay")
OF_A_GRID = ("seeds", "at-once")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *((f"--{option} 0", f"--{option} 0 least") for option in COUNTS),
        *((f"--{option} -1", f"--{option} -1.0 least") for option in NOT_NEGATIVE),
        ("--epochs x", "--epochs 'x'"),
        ("--dataset mnist", "--dataset 'mnist' digits cifar10"),
        ("--model resnet1", "--model 'resnet1' resnet8"),
        ("--arms adam", "--arms 'adam' cal tb"),
        ("--arms tb tb", "--arms once"),
        ("--arms", "--arms once"),
        ("--width 0", "--width 0.0 above"),
        ("--learning-rate nan", "--learning-rate nan finite"),
        ("--learning-rate 1e999", "--learning-rate inf finite"),
        ("--momentum 1", "--momentum 1.0 below"),
        ("--metric beta", "--metric 'beta' alpha_hat spectral_norm"),
        ("--fit mean", "--fit 'mean' median min_ks peak"),
        ("--init keras", "--init 'keras' flax torch"),
        ("--compute float16", "--compute 'float16' bfloat16"),
        ("--high inf", "--high inf finite"),
        ("--seed -1", "--seed -1 4294967295"),
        ("--seed 1.5", "--seed '1.5'"),
        ("--subset 2000", "--subset 2000 1437"),
        ("--subset 10", "--batch-size 64 10"),
        ("--batch-size", "--batch-size"),
        ("--validation 1374", "--validation 1374 1373"),
        ("--subset 1400 --validation 38", "--validation 38 37"),
        ("--data-dir .", "--data-dir '.' digits"),
        ("--dataset cifar10 --data-dir /nowhere", "--data-dir '/nowhere'"),
        ("--unknown 3", "--unknown"),
        ("--epoch 3", "--epoch"),
        ("é", "é"),
        *((f"tiny --{option} 0", f"--{option} 0 least") for option in OF_A_GRID),
        ("tiny --arms adam", "--arms adam"),
        ("tiny --data-dir .", "--data-dir '.' digits"),
        ("tiny --low 1", "--low"),
        ("unknown", "CONFIG 'unknown' digits cifar10-check"),
    ],
)
def test_bad_arguments(arguments, words, capsys, tmp_path):
    out, given = tmp_path / "run", arguments.split()
    main = compare.main if given[0] in ("tiny", "unknown") else train.main
    assert_fails(main, capsys, [*given, "--out", str(out)], *words.split())
    assert not out.exists()
