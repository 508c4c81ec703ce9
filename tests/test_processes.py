"""Two processes on one mesh train like one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def run(processes, out):
    """What each process writes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    script = str(ROOT / "tests" / "one_of_two.py")
    children = [
        subprocess.Popen(
            [sys.executable, script, str(processes), str(index), port, str(out)],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        for child in children:
            output, _ = child.communicate(timeout=400)
            assert child.returncode == 0, output
    finally:
        for child in children:
            child.kill()
    return [json.loads(Path(f"{out}.{i}").read_text()) for i in range(processes)]


def test_two_processes_train_like_one(tmp_path):
    """Sums of gradients are taken in another order: equal up to rounding."""
    (one,) = run(1, tmp_path / "one")
    first, second = run(2, tmp_path / "two")
    assert (one["processes"], first["processes"]) == (1, 2)
    assert one["devices"] == first["devices"] == 4
    for name in ("losses", "multipliers", "alpha", "parameters"):
        # The processes share every number, to the bit.
        assert first[name] == second[name]
        np.testing.assert_allclose(first[name], one[name], rtol=1e-4)
    assert len(first["losses"]) == 10
    assert min(first["multipliers"]) == 0.5
