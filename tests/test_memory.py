"""Temporary memory, as XLA reserves it: of an analysis, and of a training step."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

import tb_optax
from tb_optax import eigenvalues
from tb_optax.spectrum import GRAM, SINGULAR_VALUES, compute_spectra

ITEM = 4


def reserved(function, *args):
    """Bytes of temporary memory of the compiled function."""
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


SHAPES = (
    [(1, 1, 600, 1000)],
    [(1, 1, 4096, 64)],
    [(1, 400, 64, 64)],
    [(1, 64, 256, 256)],
    [(1, 9, 128, 256), (2, 9, 256, 128), (1, 1, 300, 40), (1, 16, 512, 512)],
    [(1, 1, 512, 512)] * 8,
)


@pytest.mark.parametrize(
    ("shapes", "route", "factor", "gram_side"),
    [
        *((shapes, GRAM, 1, None) for shapes in SHAPES),
        *((shapes, SINGULAR_VALUES, 2, 4096) for shapes in SHAPES),
        *((shapes, SINGULAR_VALUES, 2, 0) for shapes in SHAPES[:2]),
    ],
)
def test_an_analysis_reserves_what_is_documented(
    shapes, route, factor, gram_side, monkeypatch
):
    monkeypatch.setattr(eigenvalues, "_GRAM_SIDE", gram_side)
    stacks = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found = reserved(lambda *s: compute_spectra(s, [1.0] * len(s), route), *stacks)
    kernels = sum(math.prod(shape) for shape in shapes)
    count = sum(layers * pooled for layers, pooled, _, _ in shapes)
    one = max(n * m + min(n, m) ** 2 for _, _, n, m in shapes)
    rows = max(min(n, m) for _, _, n, m in shapes)
    assert found <= ITEM * (kernels + factor * (2 * one + 40 * count * rows))


def step_of(tx, width, batch):
    """A training step of two layers, and shapes of its arguments."""

    def loss(params, inputs):
        hidden = jnp.tanh(inputs @ params["first"]["kernel"])
        return jnp.sum((hidden @ params["last"]["kernel"]) ** 2)

    def step(params, state, inputs):
        grads = jax.grad(loss)(params, inputs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    kernel = jax.ShapeDtypeStruct((width, width), jnp.float32)
    params = {"first": {"kernel": kernel}, "last": {"kernel": kernel}}
    inputs = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    return step, (params, jax.eval_shape(tx.init, params), inputs)


@pytest.mark.parametrize("batch", [1, 4096])
def test_a_refresh_in_the_graph_lies_where_activations_were(batch):
    """A step reserves the larger of the two at most, and nothing where none comes."""
    params = {name: {"kernel": jnp.zeros((256, 256))} for name in ("first", "last")}
    analyze = tb_optax.layer_analysis(tb_optax.find_layers(params))
    plain = optax.sgd(0.1, momentum=0.9)
    sizes = {}
    for interval in (None, 10):
        tx = tb_optax.temp_balance(plain, analyze, interval=interval)
        step, args = step_of(tx, 256, batch)
        sizes[interval] = reserved(step, *args)
    step, args = step_of(plain, 256, batch)
    without, analysis = reserved(step, *args), reserved(analyze, args[0])
    small = 2**16
    assert sizes[None] <= without + small
    assert sizes[10] <= max(without, analysis) + small
