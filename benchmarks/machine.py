"""The machine under a measurement: its cores, and its record."""

import contextlib
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.errors import UserError

# Read by OpenMP, OpenBLAS and MKL; recorded where somebody has set them.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "torch", "optax", "flax", "tb-optax")


def bind_cores(count: int | None) -> None:
    """Bind the process to some cores; call it before importing what is measured.

    The pools of XLA, BLAS and PyTorch, and all children, follow. Nothing else about
    their threads is set: they are measured as they are by default. None takes all cores
    that the process may use.
    """
    cores = sorted(os.sched_getaffinity(0))
    count = count or len(cores)
    if count > len(cores):
        raise UserError(f"--cores is {count}; allowed: at most {len(cores)}")
    os.sched_setaffinity(0, cores[:count])
    # PyTorch on the same accelerator needs memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def describe(program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the command, hardware, threads and versions of a measurement."""
    import jax  # Only once the cores are bound.

    device = jax.devices()[0]
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
        "versions": {"python": platform.python_version()} | _versions(),
    }


def torch_on_same_device():
    """Return PyTorch and its name of the device that JAX uses, or raise `UserError`."""
    import jax  # Only once the cores are bound.
    import torch

    if jax.default_backend() == "cpu":
        return torch, "cpu"
    if not torch.cuda.is_available():
        which = f"PyTorch {torch.__version__}"
        raise UserError(f"{which} does not see the device that JAX uses")
    return torch, "cuda"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _processor() -> str:
    """Return the model of the processor, as the system calls it."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
