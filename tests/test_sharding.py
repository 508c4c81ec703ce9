"""Many devices: a file of tests in a process with eight simulated ones."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_eight_devices():
    """In a process of its own: the number of devices is fixed when JAX starts."""
    cases = str(Path(__file__).parent / "eight_devices.py")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
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
