"""Train a small language model in Equinox with AdamW and LLR, on the text of this file.

python docs/examples/language_model.py --steps 300
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax

import tb_optax


def make_model(width: int, key):
    """Return an embedding, two blocks of attention and an MLP, and a head."""
    first, last, *keys = jax.random.split(key, 6)
    blocks = [
        {
            "norms": [eqx.nn.RMSNorm(width), eqx.nn.RMSNorm(width)],
            "attention": eqx.nn.MultiheadAttention(4, width, key=one),
            "mlp": eqx.nn.MLP(width, width, 4 * width, depth=1, key=two),
        }
        for one, two in zip(keys[::2], keys[1::2], strict=True)
    ]
    embed = eqx.nn.Embedding(128, width, key=first)
    head = eqx.nn.Linear(width, 128, key=last)
    return {"embed": embed, "blocks": blocks, "head": head}


def apply(model, tokens):
    """Return the logits of one sequence of tokens."""
    x = jax.vmap(model["embed"])(tokens)
    for block in model["blocks"]:
        y = jax.vmap(block["norms"][0])(x)
        x = x + block["attention"](y, y, y, mask=np.tri(len(x), dtype=bool))
        x = x + jax.vmap(block["mlp"])(jax.vmap(block["norms"][1])(x))
    return jax.vmap(model["head"])(x)


def main(arguments=None) -> float:
    """Train for some steps; return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args(arguments).steps
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    model = make_model(64, jax.random.key(0))
    # LLR balances the embedding too, which is looked up and so is not traced.
    layers = [tb_optax.Layer("embed/weight", tb_optax.MatrixAxes((0,), (1,)))]
    layers += tb_optax.trace_layers(apply, model, text[:8])
    adamw = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps))
    tx = optax.chain(adamw, tb_optax.recipes.llr(layers, total_steps=steps))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    def loss_fn(model, tokens):
        logits = jax.vmap(lambda x: apply(model, x))(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    @eqx.filter_jit
    def train_step(model, opt_state, tokens):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, tokens)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, loss

    rng = np.random.default_rng(0)
    for step in range(steps):
        tokens = text[rng.integers(0, len(text) - 65, (16, 1)) + np.arange(65)]
        model, opt_state, loss = train_step(model, opt_state, tokens)
        if step % 100 == 0:
            print(step, f"loss {loss:.3f}", tb_optax.get_multipliers(opt_state))
    return float(loss)


if __name__ == "__main__":
    print(f"loss {main():.3f}")
