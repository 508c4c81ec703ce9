"""Train a small language model in Equinox with AdamW and balanced learning rates.

    python docs/examples/language_model.py --steps 300

It learns to predict the characters of this file. Every matrix of a block is a layer.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tb_optax


class Block(eqx.Module):
    """Attention and a feed-forward network, each after a norm."""

    norms: list[eqx.nn.RMSNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, width: int, key):
        one, two = jax.random.split(key)
        self.norms = [eqx.nn.RMSNorm(width) for _ in range(2)]
        self.attention = eqx.nn.MultiheadAttention(4, width, key=one)
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=two)

    def __call__(self, x):
        """Return what goes into the next block."""
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=jnp.tri(len(x), dtype=bool))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


def make_model(width: int, depth: int):
    """Return an embedding, blocks, a norm and a head."""
    first, last, *keys = jax.random.split(jax.random.key(0), depth + 2)
    blocks = [Block(width, key) for key in keys]
    embedding = eqx.nn.Embedding(128, width, key=first)
    return embedding, blocks, eqx.nn.Linear(width, 128, key=last)


def apply(model, tokens):
    """Return the logits of one sequence of tokens."""
    embedding, blocks, head = model
    x = jax.vmap(embedding)(tokens)
    for block in blocks:
        x = block(x)
    return jax.vmap(head)(x)


def main(arguments=None) -> float:
    """Train; return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=64)
    given = parser.parse_args(arguments)
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    params, static = eqx.partition(make_model(given.width, 2), eqx.is_inexact_array)
    layers = tb_optax.trace_layers(
        lambda params, x: apply(eqx.combine(params, static), x), params, text[:8]
    )
    analyze = tb_optax.layer_analysis(layers[:-1])  # The last one is the head.
    schedule = optax.warmup_cosine_decay_schedule(
        0, 3e-3, given.steps // 10, given.steps
    )
    tx = tb_optax.temp_balance(optax.adamw(schedule), analyze, interval=50)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, tokens):
        def loss_fn(params):
            logits = jax.vmap(lambda x: apply(eqx.combine(params, static), x))(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], tokens[:, 1:]
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(0)
    for step in range(given.steps):
        starts = rng.integers(0, len(text) - 65, 16)
        tokens = jnp.stack([text[start : start + 65] for start in starts])
        params, opt_state, loss = train_step(params, opt_state, tokens)
        if step % 100 == 0:
            print(step, f"loss {loss:.3f}", tb_optax.get_multipliers(opt_state))
    return float(loss)


if __name__ == "__main__":
    print(f"loss {main():.3f}")
