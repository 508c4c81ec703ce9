"""The machine under a measurement: its cores, and its record."""

import contextlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from benchmarks.errors import UserError

# Read by OpenMP, OpenBLAS and MKL; recorded where somebody has set them.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "torch", "optax", "flax", "tb-optax")


def bind_cores(count: int | None) -> None:
    """Bind the process to some cores, before JAX starts its threads; None: to all."""
    cores = sorted(os.sched_getaffinity(0))
    if count is not None and count > len(cores):
        raise UserError(f"--cores is {count}; allowed: at most {len(cores)}")
    os.sched_setaffinity(0, cores[:count])


def leave_memory() -> None:
    """Let JAX leave memory of the accelerator to PyTorch; call it before JAX starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def describe(program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the command, hardware, threads and versions of a measurement."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "command": " ".join(["python -m", program, *arguments]),
        "hardware": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "platform": device.platform,
            "device": _processor() if device.platform == "cpu" else device.device_kind,
            "load_before": round(os.getloadavg()[0], 2),
        },
        "threads": {
            name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ
        },
        "versions": versions,
    }


def _processor() -> str:
    """Return the model of the processor, as the system calls it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return models[0].strip() if models else platform.processor() or platform.machine()
