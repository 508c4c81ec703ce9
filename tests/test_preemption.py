"""`benchmarks.train` killed and terminated: it goes on as if nothing had happened."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from runs import ROOT, TINY, assert_same_run

from benchmarks import records


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts or resumes a run; what is compiled once is kept."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    kept = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    return functools.partial(launch, {**os.environ, **kept})


def launch(environment, out):
    command = [sys.executable, "-m", "benchmarks.train", *TINY, "--no-plots"]
    return subprocess.Popen(
        [*command, "--out", str(out), "--resume"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


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
    kills, finished, start, tmp_path
):
    rng = random.Random(0)
    run, done = 0, 0
    while done < kills:
        out = tmp_path / str(run)
        process = start(out)
        wait_for_progress(process, out)
        # An epoch, an analysis or a checkpoint of this run takes some hundredths of a
        # second.
        time.sleep(rng.choice([0.01, 0.1, 1.0]) * rng.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        check_checkpoints(out)
        if process.returncode == 0:
            assert_same_run(out, finished)
            run += 1
        else:
            assert process.returncode == -signal.SIGKILL
            done += 1
    finish(start(out))
    assert_same_run(out, finished)


def test_sigterm_saves_and_says_so(finished, start, tmp_path):
    out = tmp_path / "run"
    process = start(out)
    wait_for_progress(process, out)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert output.count("\n") == 1
    assert output.startswith("stopped by SIGTERM: cal is saved behind ")
    assert "--resume" in output
    finish(start(out))
    assert_same_run(out, finished)
