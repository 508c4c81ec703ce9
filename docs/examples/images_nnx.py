"""Train an image classifier in Flax nnx with TempBalance.

    python docs/examples/images_nnx.py --steps 300

Handwritten digits of scikit-learn, SGD with momentum under a cosine.
"""

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import tb_optax


class Network(nnx.Module):
    """Three convolutions and a classifier."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        sizes, window = (1, width, width), (3, 3)
        self.convolutions = nnx.List(
            nnx.Conv(n, width, window, rngs=rngs) for n in sizes
        )
        self.norms = nnx.List(nnx.BatchNorm(width, rngs=rngs) for _ in range(3))
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        """Return logits."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        return self.head(x.mean((1, 2)))


def loss_fn(model, images, labels):
    """Return the mean cross-entropy."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    """Update the model and the optimizer in place; return the loss."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads)
    return loss


def main(arguments=None) -> float:
    """Train; return the accuracy on the last fifth of the digits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=32)
    given, digits = parser.parse_args(arguments), load_digits()
    images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
    labels, train = jnp.asarray(digits.target), 1400

    model = Network(given.width, nnx.Rngs(0))
    layers = tb_optax.trace_layers(model, images[:1])
    analyze = tb_optax.layer_analysis(layers[1:-1])  # Not the first and the last.
    schedule = optax.cosine_decay_schedule(0.1, given.steps)
    tx = tb_optax.temp_balance(optax.sgd(schedule, momentum=0.9), analyze, interval=20)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    rng = np.random.default_rng(0)
    for step in range(given.steps):
        rows = rng.integers(0, train, 64)
        loss = train_step(model, optimizer, images[rows], labels[rows])
        if step % 100 == 0:
            logged = tb_optax.log_dict(optimizer.opt_state, layers[1:-1])
            print(step, f"loss {loss:.3f}", *map("{:.2f}".format, logged.values()))
    model.eval()
    return float((model(images[train:]).argmax(-1) == labels[train:]).mean())


if __name__ == "__main__":
    print(f"accuracy {main():.3f}")
