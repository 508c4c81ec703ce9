"""Many devices: tests in processes with eight simulated ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Without the quick emitters of `conftest` tables of kernels in pieces are those of one
# device to the bit.
EMITTERS = {"not quadrature": "true", "quadrature": "false"}


@pytest.mark.parametrize("kind", EMITTERS)
@pytest.mark.parametrize(
    "cases", ["not long", pytest.param("long", marks=pytest.mark.long)]
)
def test_on_eight_devices(kind, cases):
    """In a process of its own: the number of devices is fixed when JAX starts."""
    file = Path(__file__).parent / "eight_devices.py"
    flags = os.environ.get("XLA_FLAGS", "")
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-k", kind, "-m", cases),
            *("-p", "no:cacheprovider", str(file)),
        ],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "8",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": flags.replace("emitters=false", f"emitters={EMITTERS[kind]}"),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
