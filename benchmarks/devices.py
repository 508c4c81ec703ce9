"""Time one analysis on 1, 2, 4 and 8 simulated devices of this machine's processor.

    python -m benchmarks.devices --model resnet18 --width 0.5

The devices share the cores that there are: more of them than cores save no time, and
what they add is the cost of spreading.  Kernels are sharded over their outputs.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import tb_optax
from benchmarks import models
from benchmarks.commandline import Parser, guarded, positive_number, whole_number
from benchmarks.timing import interleave, summary

COUNTS = (1, 2, 4, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m benchmarks.devices", description=__doc__)
    parser.add_argument("--model", choices=models.NAMES, default="resnet18")
    parser.add_argument("--width", type=positive_number, default=0.5, metavar="FACTOR")
    parser.add_argument("--rounds", type=whole_number, default=5, metavar="N")
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", max(COUNTS))
    model = models.build(
        options.model, num_classes=10, width=options.width, rngs=nnx.Rngs(0)
    )
    analyze = tb_optax.layer_analysis(models.layers_in_order(model)[1:-1])
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    placed = {count: _place(params, count) for count in COUNTS}
    tables = {count: jax.device_get(analyze(placed[count])) for count in COUNTS}
    samples = interleave(
        {
            str(count): functools.partial(_timed, analyze, placed[count])
            for count in COUNTS
        },
        options.rounds,
    )
    print("| devices | seconds, median [lowest, highest] | same bits as one |")
    print("|---|---|---|")
    for count in COUNTS:
        same = jax.tree.leaves(
            jax.tree.map(np.array_equal, tables[count], tables[COUNTS[0]])
        )
        taken = summary(samples[str(count)])
        print(
            f"| {count} | {taken.median:.3f} [{taken.low:.3f}, {taken.high:.3f}] "
            f"| {'yes' if all(same) else 'no'} |"
        )


def _timed(analyze: Any, params: Any) -> None:
    jax.block_until_ready(analyze(params))


def _place(params: Any, count: int) -> Any:
    mesh = jax.make_mesh((count,), ("model",), devices=jax.devices()[:count])

    def place(leaf: jax.Array) -> jax.Array:
        spec: list[str | None] = [None] * leaf.ndim
        if leaf.shape[-1] % count == 0:
            spec[-1] = "model"
        return jax.device_put(
            np.asarray(leaf), NamedSharding(mesh, PartitionSpec(*spec))
        )

    return jax.tree.map(place, params)


if __name__ == "__main__":
    sys.exit(main())
