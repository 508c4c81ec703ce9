"""Tiny runs of the benchmarks, with programs that are compiled once."""

import dataclasses
import hashlib

import jax
import numpy as np

from benchmarks import arms, data, experiments, images, loop
from benchmarks.files import read_json
from benchmarks.runs import LAYERS, METRICS, RECORD, Run
from benchmarks.train import parse

EPOCHS = 3
TINY = ["--model", "resnet4", "--width", "0.5", "--subset", "96", "--seed", "43"]
TINY += ["--batch-size", "32", "--epochs", str(EPOCHS)]
CONFIG = parse(TINY).config


class Killed(BaseException):
    """Ends a command as suddenly as an exception can."""


def eight_images():
    """Random color images of 8 x 8 pixels in ten classes, to train and to test on."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 8, 3), np.uint8)
    labels = rng.integers(0, 10, 8, np.int32)
    preparation = images.Preparation.of(pixels, pad=1, flip=True)
    parts = {"train": (pixels, labels), "test": (pixels, labels)}
    return images.Dataset(parts, 10, preparation)


def compile_once(monkeypatch):
    """Compiles the epoch of a program once for as many states."""
    compiled, real = {}, loop.Program.epoch

    def epoch(self, rows, count):
        if (self, count) not in compiled:
            compiled[self, count] = real(self, rows, count)
        return compiled[self, count]

    monkeypatch.setattr(loop.Program, "epoch", epoch)


def keep_programs(monkeypatch):
    """Gives experiments that differ in seeds and held-out rows the same program.

    Returns the seed and the arm of every call for a program.
    """
    calls, made = [], {}

    def make_program(config, arm, data):
        calls.append((config.seed, arm.name))
        config = dataclasses.replace(config, seed=0, validation=None, arms=("cal",))
        rows = hashlib.sha256(data.parts["train"][0].tobytes()).hexdigest()
        key = config, arm.name, rows
        if key not in made:
            made[key] = real_program(config, arm, data)
        return made[key]

    real_program = loop.make_program
    monkeypatch.setattr(experiments, "make_program", make_program)
    compile_once(monkeypatch)
    return calls


def timeless(rows):
    """Rows without the fields that hold seconds."""
    return [
        {key: value for key, value in row.items() if not key.endswith("_seconds")}
        for row in rows
    ]


def record(path):
    """What a run in this directory has written down."""
    return read_json(path / RECORD)


def program_of(arm):
    """The program of the tiny runs of an arm."""
    dataset = data.load(CONFIG)
    return experiments.make_program(CONFIG, arms.ARMS[arm], dataset)


def final_state(run):
    """The last checkpoint of a run, as NumPy arrays."""
    with run.session(program_of(run.arm)) as session:
        return jax.device_get(session.state)


def assert_same_runs(path, other, *names):
    """The same records of these arms except for seconds, and the same last states."""
    for arm in names:
        one, two = Run(path / arm, CONFIG, arm), Run(other / arm, CONFIG, arm)
        for name in (METRICS, LAYERS):
            assert timeless(one.rows(name)) == timeless(two.rows(name))
        jax.tree.map(np.testing.assert_array_equal, final_state(one), final_state(two))


def snapshot(path):
    """Every file below a directory, with its content."""
    return {
        file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def assert_fails(main, capsys, arguments, *words):
    """Exit code 2, nothing on stdout, and on stderr one line with these words.

    Before it there may be a progress bar. What the parser of the command line refuses,
    it explains in a box of several lines.
    """
    capsys.readouterr()
    boxed = False
    try:
        code = main(list(arguments))
    except SystemExit as error:
        code, boxed = error.code, True
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    if not boxed:
        _, _, err = err.partition("error: ")
        assert err.count("\n") == 1
    for word in words:
        assert word in err, err
