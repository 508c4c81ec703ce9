"""Ten steps of a small network in one of several processes: `test_processes` starts it.

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
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tb_optax
from tb_optax import Layer, MatrixAxes

DEVICES = 4
STEPS = 10
SHAPES = {"conv": (3, 3, 4, 16), "dense": (16, 24), "head": (24, 8)}
LAYERS = (
    Layer("conv", MatrixAxes((2,), (3,), pooled=(0, 1))),
    Layer("dense", MatrixAxes((0,), (1,))),
    Layer("head", MatrixAxes((0,), (1,))),
)


def loss_of(params, images, labels):
    """Mean cross entropy of a convolution, a mean over positions and two layers."""
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        images, params["conv"], (1, 1), "SAME", dimension_numbers=layout
    )
    x = jnp.tanh(jax.nn.relu(x).mean(axis=(1, 2)) @ params["dense"])
    logits = x @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train():
    """Trains on a mesh of all devices of all processes."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)

    def everywhere(leaf, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

    def kernel(*shape):
        leaf = np.asarray(rng.normal(size=shape) / shape[-2], np.float32)
        return everywhere(leaf, *[None] * (len(shape) - 1), ("data", "model"))

    with jax.set_mesh(mesh):
        params = {name: kernel(*shape) for name, shape in SHAPES.items()}
        images = rng.normal(size=(8, 8, 8, 4)).astype(np.float32)
        batch = everywhere(images, "data"), everywhere(rng.integers(0, 8, 8), "data")
        analyze = tb_optax.layer_analysis(LAYERS, min_eigenvalues=8)
        tx = tb_optax.temp_balance(optax.sgd(0.05, momentum=0.9), analyze, interval=3)
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params, state, images, labels):
            loss, gradients = jax.value_and_grad(loss_of)(params, images, labels)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            sums = [jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params)]
            return params, state, loss, sums

        losses, sums = [], []
        for _ in range(STEPS):
            params, state, loss, sums = step(params, state, *batch)
            losses.append(float(loss))
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
