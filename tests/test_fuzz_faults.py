"""Damaged files and random command lines: one clear line, nothing overwritten."""

import contextlib
import functools
import io
import itertools
import pickle
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from runs import TINY

from benchmarks import checkpoints
from benchmarks.train import main


class Marked(Exception):
    """What unpickling of the bait would raise."""


def explode():
    raise Marked


class Bait:
    """An object that tells on whoever unpickles it."""

    def __reduce__(self):
        return explode, ()


def snapshot(path):
    return {
        file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def check_one_line(arguments):
    """Exit code 2, one line on stderr, nothing on stdout."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    assert code == 2, (arguments, err.getvalue())
    assert out.getvalue() == ""
    # A progress bar may stand before it.
    _, _, message = err.getvalue().partition("error: ")
    assert message.strip(), arguments
    assert message.count("\n") == 1, message
    assert "Traceback" not in err.getvalue()


def damages(content, rng):
    """Cut, emptied, filled with noise, with one byte changed, and a pickle."""
    # A text without its last newline is not damaged.
    yield content[: rng.randrange(len(content.removesuffix(b"\n")))]
    yield b""
    yield rng.randbytes(len(content))
    place = rng.randrange(len(content))
    yield content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
    yield pickle.dumps(Bait())


# --- the command line ----------------------------------------------------------------

WORDS = ["", "-1", "0", "nan", "inf", "1e999", "x", "--", "é\x00", "9" * 400, "1.5"]
NUMBERS = ["--subset", "--epochs", "--batch-size", "--interval", "--seed"]
NUMBERS += ["--width", "--learning-rate", "--weight-decay", "--momentum"]
NUMBERS += ["--low", "--high"]
GOOD = {
    ("--width", "1.5"),
    ("--learning-rate", "1.5"),
    ("--weight-decay", "0"),
    ("--weight-decay", "1.5"),
    ("--momentum", "0"),
    ("--low", "0"),
    ("--low", "1.5"),
    ("--high", "0"),
    ("--high", "1.5"),
    ("--seed", "0"),
}
BAD_LINES = [
    [option, word]
    for option, word in itertools.product(NUMBERS, WORDS)
    if (option, word) not in GOOD
]
BAD_LINES += [
    [option, word]
    for option, word in itertools.product(["--dataset", "--model", "--arms"], WORDS)
]
BAD_LINES += [["--" + word] for word in ("nope", "epoch", "resum", "-out")]
BAD_LINES += [["--data-dir", word] for word in WORDS if word != "--"]
BAD_LINES += [[option] for option in NUMBERS]


def test_random_command_lines(tmp_path):
    assert len(BAD_LINES) > 150
    for arguments in BAD_LINES:
        out = tmp_path / "run"
        check_one_line(["--out", str(out), *arguments])
        assert not out.exists(), arguments


# --- files of a run -------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(finished, path)
    return path


def test_damaged_files_of_a_run(copy):
    rng = random.Random(0)
    files = [
        file
        for file in sorted(copy.rglob("*"))
        if file.is_file() and file.stat().st_size and file.suffix not in (".png", ".md")
    ]
    cases = 0
    for file in files:
        content = file.read_bytes()
        for damaged in rng.sample(list(damages(content, rng)), 4):
            file.write_bytes(damaged)
            before = snapshot(copy)
            check_one_line([*TINY, "--no-plots", "--out", str(copy), "--resume"])
            assert snapshot(copy) == before, file
            cases += 1
        file.write_bytes(content)
    assert cases >= 100


@pytest.mark.parametrize("name", ["metrics.jsonl", "layers.jsonl"])
def test_files_that_lost_whole_lines(copy, name):
    file = copy / name
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    for count in range(len(lines)):
        file.write_bytes(b"".join(lines[:count]))
        check_one_line([*TINY, "--no-plots", "--out", str(copy), "--resume"])
    file.write_bytes(content)


def test_a_checkpoint_of_the_wrong_kind(copy):
    """A directory in the place of a file, and a file in the place of a directory."""
    path = copy / "checkpoints" / "tb"
    newest = path / str(checkpoints.newest(path))
    moved = copy.parent / "moved"
    newest.rename(moved)
    newest.write_bytes(b"no directory")
    check_one_line([*TINY, "--no-plots", "--out", str(copy), "--resume"])
    newest.unlink()
    (newest / "sha256.json").mkdir(parents=True)
    check_one_line([*TINY, "--no-plots", "--out", str(copy), "--resume"])
    shutil.rmtree(newest)
    moved.rename(newest)


# --- data -----------------------------------------------------------------------------


@functools.cache
def parquet_bytes():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(4):
        stream = io.BytesIO()
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append({"bytes": stream.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array(rows, kind), "label": [0, 1, 2, 3]})
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def test_damaged_parquet(tmp_path):
    """Truncated at every sixteenth, and filled with noise from there on."""
    content = parquet_bytes()
    rng = random.Random(1)
    directory, out = tmp_path / "data", tmp_path / "run"
    directory.mkdir()
    (directory / "test-0.parquet").write_bytes(content)
    arguments = ["--dataset", "cifar10", "--data-dir", str(directory), "--subset", "4"]
    arguments += ["--batch-size", "2", "--out", str(out)]
    step = len(content) // 16
    cases = [content[: place * step] for place in range(16)]
    cases += [kept + rng.randbytes(len(content) - len(kept)) for kept in cases]
    cases += [pickle.dumps(Bait()), b"PAR1", b"PAR1" * 3, content[4:]]
    for damaged in cases:
        (directory / "train-0.parquet").write_bytes(damaged)
        check_one_line(arguments)
        assert not out.exists()
