"""Several analyses in one program: none waits for another's thread."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, jax, tb_optax

if sys.argv[1] == "1":
    # Enough large ones for LAPACK calls side by side.
    shapes = [(8, 8, 256, 256), (256, 48)]
else:
    shapes = [(3, 3, 16, 16), (3, 3, 16, 32), (3, 3, 32, 32), (32, 48), (48, 24)]
keys = jax.random.split(jax.random.key(0), len(shapes))
params = {
    f"layer{i}": {"kernel": jax.random.normal(key, shape)}
    for i, (key, shape) in enumerate(zip(keys, shapes))
}
layers = tb_optax.find_layers(params)
analyses = [
    tb_optax.layer_analysis(layers),
    tb_optax.layer_analysis(layers[::2]),
    tb_optax.layer_analysis(layers, fit=tb_optax.fit_min_ks()),
    tb_optax.layer_analysis(layers[1:], eigenvalue_floor=1e-5),
]
together = jax.jit(lambda params: [analyze(params) for analyze in analyses])
for _ in range(8 if sys.argv[1] == "1" else 50):
    jax.block_until_ready(together(params))
print("done")
"""


@pytest.mark.parametrize("blas_threads", ["1", "2"])
def test_analyses_in_one_program_do_not_wait_for_each_other(blas_threads):
    # With batched LAPACK calls this hung in its first run on two cores.
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, blas_threads],
        env=os.environ | {"OPENBLAS_NUM_THREADS": blas_threads},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert finished.stdout == "done\n"
