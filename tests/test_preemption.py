"""`benchmarks.train` killed and terminated: it goes on as if nothing had happened."""

import json
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
from runs import assert_same_run

from benchmarks import records


def progress_of(out):
    """What changes while a run goes on: lines written, checkpoints begun and done."""
    lines = len(records.read(out / "layers.jsonl"))
    return lines, sorted(map(str, (out / "checkpoints").glob("*/*")))


def wait_for_progress(process, out):
    before, deadline = progress_of(out), time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if progress_of(out) != before:
            return
        time.sleep(0.001)


def check_checkpoints(out):
    """Each arm has one whole checkpoint at most beside what a kill left unfinished."""
    for arm in (out / "checkpoints").glob("*"):
        for path in arm.glob("*"):
            if path.name.isdecimal():
                assert json.loads((path / "sha256.json").read_text())


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return output


@pytest.mark.parametrize(
    "kills", [2, pytest.param(20, marks=pytest.mark.long)], ids=str
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    kills, finished, start_run, tmp_path
):
    rng = random.Random(0)
    out, done = tmp_path / "first", 0
    while done < kills:
        process = start_run(out)
        wait_for_progress(process, out)
        # An epoch, an analysis or a checkpoint of this run takes some hundredths of a
        # second.
        time.sleep(rng.choice([0.01, 0.1, 1.0]) * rng.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        check_checkpoints(out)
        if process.returncode == 0:
            assert_same_run(out, finished)
            out = Path(tempfile.mkdtemp(dir=tmp_path))
        else:
            assert process.returncode == -signal.SIGKILL
            done += 1
    finish(start_run(out))
    assert_same_run(out, finished)


def test_sigterm_saves_and_says_so(finished, start_run, tmp_path):
    out = tmp_path / "run"
    process = start_run(out)
    wait_for_progress(process, out)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert output.count("\n") == 1
    assert output.startswith("stopped by SIGTERM: cal is saved behind ")
    assert "--resume" in output
    finish(start_run(out))
    assert_same_run(out, finished)
