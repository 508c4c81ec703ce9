"""Two large models, traced in a process of their own: `python large_models.py`.

Prints for each the number of layers, the seconds of tracing, and by how many megabytes
the peak of memory rises above what was there before.
"""
# ruff: noqa: D101, D102  # The names of the models say what they are.

import functools
import resource
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import tb_optax

# Llama 3 70B.
WIDTH, KEYS, HIDDEN, DEPTH, WORDS, TIME = 8192, 8, 28672, 80, 128256, 4096


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def llama_norm(x, scale):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def llama_forward(params, tokens):
    """80 blocks, unrolled."""
    x = params["embed"][tokens]
    mask = jnp.tril(jnp.ones((TIME, TIME), bool))
    for block in params["blocks"]:
        y = llama_norm(x, block["norm1"])
        q, k, v = ((y @ block[n]).reshape(1, TIME, -1, 128) for n in ("q", "k", "v"))
        q = q.reshape(1, TIME, KEYS, -1, 128)
        logits = jnp.where(mask, jnp.einsum("btghk,bsgk->bghts", q, k), -1e30)
        y = jnp.einsum("bghts,bsgk->btghk", jax.nn.softmax(logits), v)
        x = x + y.reshape(x.shape) @ block["o"]
        y = llama_norm(x, block["norm2"])
        x = x + (jax.nn.silu(y @ block["gate"]) * (y @ block["up"])) @ block["down"]
    return llama_norm(x, params["norm"]) @ params["head"]


def llama() -> tuple[Callable[..., Any], Any, Any]:
    wide, narrow = array(WIDTH, WIDTH), array(WIDTH, KEYS * 128)
    up, down, vector = array(WIDTH, HIDDEN), array(HIDDEN, WIDTH), array(WIDTH)
    block = {"q": wide, "k": narrow, "v": narrow, "o": wide, "gate": up, "up": up}
    block |= {"down": down, "norm1": vector, "norm2": vector}
    params = {"embed": array(WORDS, WIDTH), "blocks": [block] * DEPTH}
    params |= {"norm": vector, "head": array(WIDTH, WORDS)}
    return llama_forward, params, jax.ShapeDtypeStruct((1, TIME), jnp.int32)


class Bottleneck(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def norm(x):
            return nn.BatchNorm(use_running_average=False)(x)

        conv = functools.partial(nn.Conv, use_bias=False)
        y = nn.relu(norm(conv(self.width, (1, 1))(x)))
        y = nn.relu(norm(conv(self.width, (3, 3), strides=self.stride)(y)))
        y = norm(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm(conv(4 * self.width, (1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet152(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 8, 36, 3)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = Bottleneck(64 * 2**stage, stride)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def resnet152() -> tuple[Callable[..., Any], Any, Any]:
    model, images = ResNet152(), jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
    state = jax.eval_shape(model.init, jax.random.key(0), images)
    params = state.pop("params")
    statistics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), state)

    def forward(params, images):
        variables = {"params": params, **statistics}
        return model.apply(variables, images, mutable=list(statistics))

    return forward, params, images


if __name__ == "__main__":
    for make in (llama, resnet152):
        forward, params, inputs = make()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        layers = tb_optax.trace_layers(forward, params, inputs, norms="before")
        seconds = time.process_time() - start
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(len(layers), seconds, used / 1024)
