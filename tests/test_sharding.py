"""Many devices: files of tests in processes with eight simulated ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Without the quick emitters of `conftest` tables of kernels in pieces are those of one
# device to the bit.
EMITTERS = {"eight_devices": "true", "eight_devices_quadrature": "false"}


@pytest.mark.parametrize("name", EMITTERS)
@pytest.mark.parametrize(
    "cases", ["not long", pytest.param("long", marks=pytest.mark.long)]
)
def test_on_eight_devices(name, cases):
    """In a process of its own: the number of devices is fixed when JAX starts."""
    file = Path(__file__).parent / f"{name}.py"
    flags = os.environ.get("XLA_FLAGS", "")
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", cases),
            *("-p", "no:cacheprovider", str(file)),
        ],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "8",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": flags.replace("emitters=false", f"emitters={EMITTERS[name]}"),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
