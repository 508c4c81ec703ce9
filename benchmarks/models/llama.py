"""A small Llama: RMSNorm, rotary positions, SwiGLU, no biases.

References:
    Touvron et al, `LLaMA: Open and Efficient Foundation Language Models
    <https://arxiv.org/abs/2302.13971>`_, 2023
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Attention(nnx.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            linear(width, width) for _ in range(4)
        )
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        """Return the new features (batch, length, width)."""
        heads = (*x.shape[:2], self.heads, -1)
        query = rotate(self.query(x).reshape(heads))
        key = rotate(self.key(x).reshape(heads))
        value = self.value(x).reshape(heads)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.reshape(x.shape))


class SwiGLU(nnx.Module):
    """A gated MLP, 8/3 as wide inside, in multiples of 8."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        hidden = -(-width // 3) * 8
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate, self.up = linear(width, hidden), linear(width, hidden)
        self.down = linear(hidden, width)

    def __call__(self, x: Array) -> Array:
        """Return the new features (batch, length, width)."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and MLP, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp = SwiGLU(width, rngs)

    def __call__(self, x: Array) -> Array:
        """Return the new features (batch, length, width)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """A language model; its heads divide its width in even parts.

    If it is tied, the logits are products with the embedding.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        *,
        tied: bool,
        rngs: nnx.Rngs,
    ):
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = (
            None if tied else nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)
        )

    def __call__(self, tokens: Array) -> Array:
        """Return the logits (batch, length, vocabulary) of the next tokens."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.embedding.attend(x) if self.head is None else self.head(x)


def rotate(x: Array) -> Array:
    """Rotate pairs of features by angles that grow with the position.

    Args:
        x: queries or keys (batch, length, heads, features), features even.

    References:
        Su et al, `RoFormer: Enhanced Transformer with Rotary Position Embedding
        <https://arxiv.org/abs/2104.09864>`_, 2021
    """
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency
    one, two = x[..., :half], x[..., half:]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([one * cosine - two * sine, two * cosine + one * sine], -1)
