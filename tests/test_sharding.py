"""Many devices: `eight_devices.py` in a process with eight simulated ones."""

import os
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).parent / "eight_devices.py"


def test_on_eight_devices():
    """In a process of its own: the number of devices is fixed when JAX starts."""
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
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
