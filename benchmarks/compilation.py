"""What XLA says of an analysis that is compiled in a process of its own.

    python -m benchmarks.compilation resnet18

prints one JSON object: seconds to load LAPACK, which JAX does once per process, then
to trace and to compile; bytes of temporary memory. Nothing is computed, so that the
largest network costs no more than its compilation.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import tb_optax
from benchmarks.networks import networks


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Return what a program allocates besides its arguments and results."""
    memory = compiled.memory_analysis()
    if memory is None:
        backend = jax.default_backend()
        raise RuntimeError(f"{backend} does not tell what memory a program takes")
    return memory.temp_size_in_bytes


def measure(name: str) -> dict[str, Any]:
    """Trace and compile the analysis of a network."""
    network = networks()[name]
    analyze = jax.jit(tb_optax.layer_analysis(network.layers))
    abstract = network.abstract()
    one = jax.block_until_ready(jnp.ones((1, 1)))  # Before the clock the backend is up.
    begin = time.perf_counter()
    jax.jit(jax.lax.linalg.tridiagonal).lower(one)
    start = time.perf_counter()
    lowered = analyze.lower(abstract)
    traced = time.perf_counter()
    compiled = lowered.compile()
    stop = time.perf_counter()
    return {
        "load_seconds": start - begin,
        "trace_seconds": traced - start,
        "compile_seconds": stop - traced,
        "temporary_bytes": temporary_bytes(compiled),
    }


def measure_afresh(name: str) -> dict[str, Any]:
    """Measure in a new process, where neither JAX nor XLA remembers anything."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE"))
    }
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.compilation", name],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(process.stdout)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
