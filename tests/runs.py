"""Tiny runs of `benchmarks.train`, and when two of them are the same."""

from pathlib import Path

import jax
import numpy as np

from benchmarks import arms, configs, data, loop, records
from benchmarks.checkpoints import open_checkpoints
from benchmarks.data.augment import Preparation

ROOT = Path(__file__).parents[1]
EPOCHS = 3
TINY = ["--model", "resnet8", "--width", "0.5", "--subset", "96", "--seed", "7"]
TINY += ["--batch-size", "32", "--epochs", str(EPOCHS)]


def eight_images():
    """Random colour images of 8 x 8 pixels in ten classes, to train and to test on."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 8, 8, 3), np.uint8)
    labels = rng.integers(0, 10, 8, np.int32)
    preparation = Preparation.of(images, pad=1, flip=True)
    none = images[:0], labels[:0]
    return data.Dataset(images, labels, *none, images, labels, 10, preparation)


def timeless(path):
    """The lines of a file without the fields that hold seconds."""
    return [
        {key: value for key, value in row.items() if not key.endswith("_seconds")}
        for row in records.read(path)
    ]


def final_state(path, arm):
    """The last checkpoint of an arm, as NumPy arrays."""
    config = configs.parse(TINY).config
    program = loop.make_program(config, arms.ARMS[arm], data.load(config))
    with open_checkpoints(path / "checkpoints" / arm) as checkpoints:
        return jax.device_get(checkpoints.restore(program.abstract))


def assert_same_run(path, other):
    """The same records but for their seconds, and the same last states."""
    for name in ("metrics.jsonl", "layers.jsonl"):
        assert timeless(path / name) == timeless(other / name)
    for arm in ("cal", "tb"):
        jax.tree.map(
            np.testing.assert_array_equal,
            final_state(path, arm),
            final_state(other, arm),
        )


def snapshot(path):
    """Every file below a directory, with its content."""
    return {
        file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def assert_fails(main, capsys, arguments, *words):
    """Exit code 2, and one line on stderr with these words."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
