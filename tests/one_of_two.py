"""Ten steps of a small ResNet in one of several processes: `test_processes` starts it.

    python tests/one_of_two.py PROCESSES INDEX PORT OUT

Batch and kernels are sharded over four devices, those of all processes. Each process
writes losses, multipliers and sums of the parameters to OUT.INDEX.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tb_optax
from benchmarks import models

DEVICES = 4
STEPS = 10
BATCH = 8


def build():
    return models.build(
        "resnet8", num_classes=10, width=0.5, image_channels=1, rngs=nnx.Rngs(0)
    )


@jax.jit
def initial():
    _, params, stats = nnx.split(build(), nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def train():
    """Trains on a mesh of all devices of all processes."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def spec_of(leaf):
        divisible = leaf.ndim == 4 and leaf.shape[-1] % 4 == 0
        return P(None, None, None, ("data", "model")) if divisible else P()

    with jax.set_mesh(mesh):
        model = nnx.eval_shape(build)
        graph = nnx.graphdef(model)
        params, stats = initial()

        def everywhere(leaf, spec):
            leaf = np.asarray(leaf)
            sharding = NamedSharding(mesh, spec)
            return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

        params = jax.tree.map(lambda leaf: everywhere(leaf, spec_of(leaf)), params)
        stats = jax.tree.map(lambda leaf: everywhere(leaf, P()), stats)
        rng = np.random.default_rng(0)
        images = everywhere(
            rng.normal(size=(BATCH, 8, 8, 1)).astype(np.float32), P("data")
        )
        labels = everywhere(rng.integers(0, 10, BATCH), P("data"))
        layers = models.layers_in_order(model)[1:-1]
        analyze = tb_optax.layer_analysis(layers, min_eigenvalues=8)
        tx = tb_optax.temp_balance(optax.sgd(0.05, momentum=0.9), analyze, interval=3)
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params, stats, state, images, labels):
            def loss_fn(params):
                model = nnx.merge(graph, params, stats)
                logits = model(images, train=True)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return losses.mean(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

            (loss, new), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), new, state, loss

        losses = []
        for _ in range(STEPS):
            params, stats, state, loss = step(params, stats, state, images, labels)
            losses.append(float(loss))
        replicated = NamedSharding(mesh, P())
        sums = jax.jit(
            lambda tree: [jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)],
            out_shardings=replicated,
        )(params)
        own = tb_optax.get_state(state)
        return {
            "losses": losses,
            "multipliers": np.asarray(own.multipliers).tolist(),
            "alpha": np.asarray(own.alpha).tolist(),
            "parameters": [float(total) for total in sums],
            "processes": jax.process_count(),
            "devices": jax.device_count(),
        }


def main():
    processes, index, port, out = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", DEVICES // int(processes))
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(index))
    result = train()
    with open(f"{out}.{index}", "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
