"""Many devices: files of tests in processes with eight simulated ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["eight_devices", "eight_devices_quadrature"])
def test_on_eight_devices(name):
    """In a process of its own: the number of devices is fixed when JAX starts."""
    cases = Path(__file__).parent / f"{name}.py"
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "8",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
