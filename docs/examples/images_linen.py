"""Train a network in Flax linen: `TrainState`, a schedule, checkpoints, resuming.

    python docs/examples/images_linen.py --steps 300 --directory runs/digits

Started again with the same directory, it goes on where it was stopped.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import tb_optax


def make_state(model, images, steps: int):
    """Return the initial state."""
    params = model.init(jax.random.key(0), images[:1])["params"]
    apply_fn = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    layers = tb_optax.trace_layers(apply_fn, params, images[:1])[1:-1]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, steps // 10, steps)
    tx = optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(schedule, momentum=0.9),
        tb_optax.scale_by_temp_balance(tb_optax.layer_analysis(layers), interval=20),
    )
    return TrainState.create(apply_fn=apply_fn, params=params, tx=tx)


@jax.jit
def train_step(state: TrainState, images, labels):
    """Return the next state and the loss."""

    def loss_fn(params):
        logits = state.apply_fn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main(arguments=None) -> float:
    """Train; return the accuracy on the last fifth of the digits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--until", type=int, help="stop after this step")
    parser.add_argument("--directory", type=Path, required=True)
    given, digits = parser.parse_args(arguments), load_digits()
    images = jnp.asarray(digits.data / 16, jnp.float32)
    labels, train = jnp.asarray(digits.target), 1400

    dense = [layer for n in (128, 112, 96, 64) for layer in (nn.Dense(n), nn.relu)]
    model = nn.Sequential([*dense, nn.Dense(10)])
    state = make_state(model, images, given.steps)
    with ocp.CheckpointManager(given.directory.absolute()) as manager:
        if manager.latest_step() is not None:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(None, args=ocp.args.StandardRestore(target))
        for step in range(int(state.step), given.until or given.steps):
            rows = np.random.default_rng(step).integers(0, train, 64)
            state, loss = train_step(state, images[rows], labels[rows])
            if (step + 1) % 100 == 0:
                print(step + 1, loss, tb_optax.get_multipliers(state.opt_state))
        manager.save(int(state.step), args=ocp.args.StandardSave(state))
    logits = state.apply_fn(state.params, images[train:])
    return float((logits.argmax(-1) == labels[train:]).mean())


if __name__ == "__main__":
    print(f"accuracy {main():.3f}")
