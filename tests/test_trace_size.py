"""Tracing costs nothing with the size of a model.

As a program, `python test_trace_size.py`, it prints for each of two large models the
number of layers, the seconds of tracing, and by how many megabytes the peak of memory
rises above what was there before.
"""

import resource
import subprocess
import sys
import time

import haiku as hk
import jax
import jax.numpy as jnp
from framework_models import Model, haiku
from notation import array, arrays
from zoo import attend, heads, rms_norm

import tb_optax

BLOCK = "q o 8192x8192, k v 8192x1024, gate up 8192x28672, down 28672x8192, a b 8192"
LLAMA = {
    **arrays("embed 128256x8192, norm 8192, head 8192x128256"),
    "blocks": [arrays(BLOCK)] * 80,
}


def llama_70b(params, tokens):
    """All blocks unrolled."""
    x = params["embed"][tokens]
    mask = jnp.where(jnp.tri(tokens.shape[1]) > 0, 0.0, -1e30)
    for own in params["blocks"]:
        y = rms_norm(x, own["a"])
        k, v = (jnp.repeat(heads(y @ own[name], 8), 8, axis=2) for name in "kv")
        x = x + attend(heads(y @ own["q"], 64), k, v, mask) @ own["o"]
        y = rms_norm(x, own["b"])
        x = x + (jax.nn.silu(y @ own["gate"]) * (y @ own["up"])) @ own["down"]
    return rms_norm(x, params["norm"]) @ params["head"]


def resnet152(images, is_training):
    """With the shortcuts of its four stages."""
    return hk.nets.ResNet152(1000)(images, is_training)


def measure() -> None:
    for params, forward, inputs in (
        Model(LLAMA, llama_70b, (array(1, 4096, dtype=jnp.int32),)),
        haiku(resnet152, array(8, 224, 224, 3), is_training=True),
    ):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        layers = tb_optax.trace_layers(forward, params, *inputs, norms="before")
        seconds = time.process_time() - start
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(len(layers), seconds, used / 1024)


def test_large_models_are_traced_in_seconds_and_take_no_memory():
    result = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=True
    )
    expected = [(80 * 7 + 1, 5), (152 + 4, 3)]
    lines = result.stdout.splitlines()
    for line, (layers, seconds) in zip(lines, expected, strict=True):
        count, took, megabytes = map(float, line.split())
        assert count == layers
        assert took < seconds
        assert megabytes < 200


if __name__ == "__main__":
    measure()
