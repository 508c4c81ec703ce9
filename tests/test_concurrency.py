"""What runs at the same time: nothing waits for another's thread, or its memory."""

import itertools
import os
import re
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


COMPILE = """
import sys, jax, tb_optax

kernel = jax.ShapeDtypeStruct([int(size) for size in sys.argv[1].split(",")], "float32")
params = {"layer": {"kernel": kernel}}
analyze = tb_optax.layer_analysis(tb_optax.find_layers(params))
jax.jit(analyze).lower(params).compile()
"""

# As XLA describes where the results of the calls are.
ALLOCATION = re.compile(r"allocation (\d+):")
RESULT = re.compile(r" value: <\d+ (tridiagonal[\w.]*)\{\d\} .*size=(\d+),offset=(\d+)")


@pytest.mark.parametrize(
    "shape",
    [(12, 12, 192, 192), (8, 8, 256, 256), (5, 5, 512, 512), (3, 4, 1024, 1024)],
)
def test_calls_side_by_side_share_no_memory(tmp_path, shape):
    # XLA lets a call wait for another one to whose memory it writes.
    subprocess.run(
        [sys.executable, "-c", COMPILE, ",".join(map(str, shape))],
        env=os.environ
        | {"OPENBLAS_NUM_THREADS": "1", "XLA_FLAGS": f"--xla_dump_to={tmp_path}"},
        timeout=300,
        check=True,
    )
    results, allocation = {}, None
    for dump in tmp_path.glob("*buffer-assignment.txt"):
        for line in dump.read_text().splitlines():
            if found := ALLOCATION.match(line):
                allocation = found[1]
            if found := RESULT.match(line):
                call, (size, offset) = found[1], map(int, found.groups()[1:])
                results.setdefault(call, []).append((allocation, offset, offset + size))
    assert len(results) > 9
    for one, other in itertools.combinations(results.values(), 2):
        for (a, start, stop), (b, first, last) in itertools.product(one, other):
            assert a != b or stop <= first or last <= start
