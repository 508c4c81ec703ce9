"""Random trees, chains, steps and restarts against a plain NumPy model."""

import functools
import itertools
import random
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import spectra
from hypothesis import given
from hypothesis import strategies as st
from notation import CONV, DENSE, STACK

import tb_optax
from tb_optax import Layer
from tb_optax.layers import expand_stacks

# The tail of fewer eigenvalues is one number, which no power law fits.
LEAST = 4
RATE, MOMENTUM = 0.05, 0.9

# Shapes by path; None and integers stand for themselves, an int for an int32 leaf.
TREES: tuple[tuple[Any, tuple[Layer, ...]], ...] = (
    (
        {"a": {"kernel": (12, 9), "bias": (9,)}, "b": {"kernel": (7, 33)}, "n": None},
        (Layer("a/kernel", DENSE, ("a/bias",)), Layer("b/kernel", DENSE)),
    ),
    (
        [{"w": (2, 3, 6, 5)}, ({"w": (70, 11)}, {"scale": (11,)}), {"steps": 7}],
        (Layer("0/w", CONV), Layer("1/0/w", DENSE, ("1/1/scale",))),
    ),
    (
        {"deep": {"er": {"blocks": (3, 10, 8), "bias": (3, 8)}}, "out": (8, 1)},
        (
            Layer("deep/er/blocks", STACK, ("deep/er/bias",)),
            Layer("out", DENSE),
        ),
    ),
    (
        {"x": (1, 1), "y": (5, 5), "z": (24, 6), "empty": (0, 3), "rest": [(4,), None]},
        (
            Layer("x", DENSE),
            Layer("y", DENSE, ("rest/0",)),
            Layer("z", DENSE, part=(1, 0, 3)),
            Layer("z", DENSE, part=(1, 3, 6)),
        ),
    ),
)


class Chain(NamedTuple):
    """Wrappers around the transform; the model needs to know three things of them."""

    build: Any
    every: int = 1  # Steps whose gradients are averaged into one.
    masked: bool = False  # Whether the last leaf is out of the transform's sight.


def momentum():
    return optax.sgd(RATE, momentum=MOMENTUM)


def several_steps(balance, _):
    optimizer = optax.MultiSteps(momentum(), 2).gradient_transformation()
    return optax.chain(optimizer, balance)


CHAINS = {
    "chain": Chain(lambda balance, _: optax.chain(momentum(), balance)),
    "before the rate": Chain(
        lambda balance, _: optax.chain(
            optax.trace(MOMENTUM), balance, optax.scale_by_learning_rate(RATE)
        )
    ),
    "if finite": Chain(
        lambda balance, _: optax.apply_if_finite(optax.chain(momentum(), balance), 3)
    ),
    "named": Chain(
        lambda balance, _: optax.named_chain(("sgd", momentum()), ("tb", balance))
    ),
    "several steps": Chain(several_steps, every=2),
    "masked": Chain(
        lambda balance, mask: optax.chain(momentum(), optax.masked(balance, mask)),
        masked=True,
    ),
}
INTERVALS = (1, 2, 5)
TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Optax itself cannot skip a step of whole numbers, which momentum turns into floats.
CASES = tuple(
    case
    for case in itertools.product(range(len(TREES)), CHAINS, INTERVALS, TYPES)
    if case[:2] != (1, "if finite")
)
# Each case is compiled once: the short run has few of them.
FEW = tuple(random.Random(5).sample(CASES, 6))


def is_shape(node):
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def draw_tree(shapes, seed, dtype):
    """Kernels with heavy tails, and other leaves as they are."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        if not is_shape(shape):
            return jnp.asarray(shape, jnp.int32)
        values = rng.normal(size=shape)
        if len(shape) > 1:
            values = values * (1 + np.arange(shape[-1])) ** -rng.uniform(0.3, 1)
        return jnp.asarray(values, dtype)

    return jax.tree.map(leaf, shapes, is_leaf=is_shape)


def gradients(params, seed):
    rng = np.random.default_rng(seed)

    def leaf(value):
        if jnp.issubdtype(value.dtype, jnp.integer):
            return jnp.zeros_like(value)
        return jnp.asarray(rng.uniform(-1, 1, value.shape), value.dtype)

    return jax.tree.map(leaf, params)


def by_path(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(
            leaf, np.float64
        )
        for keys, leaf in flat
    }


@functools.cache
def compiled(case):
    tree, chain, interval, _ = case
    shapes, layers = TREES[tree]
    hidden = layers[-1].path
    if CHAINS[chain].masked:
        layers = tuple(layer for layer in layers if layer.path != hidden)
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=LEAST)
    balance = tb_optax.scale_by_temp_balance(analyze, interval=interval)

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: (
                jax.tree_util.keystr(keys, simple=True, separator="/") != hidden
            ),
            params,
        )

    tx = CHAINS[chain].build(balance, mask)
    leaves = by_path(draw_tree(shapes, 0, jnp.float32))
    shapes_by_path = {path: leaf.shape for path, leaf in leaves.items()}
    return tx, jax.jit(tx.update), expand_stacks(layers, shapes_by_path)


class Model:
    """TempBalance behind SGD with momentum, in NumPy and float64."""

    def __init__(self, case, layers):
        _, chain, self.interval, _ = case
        self.every = CHAINS[chain].every
        self.layers = layers
        self.count = 0
        self.multipliers = np.ones(len(layers))
        self.trace, self.sum = {}, {}

    def update(self, gradients, params):
        """Updates by path."""
        if self.count % self.interval == 0:
            self.multipliers = self.refresh(params)
        self.count += 1
        for path, gradient in gradients.items():
            self.sum[path] = self.sum.get(path, 0) + gradient / self.every
        if self.count % self.every:
            return {path: 0 * gradient for path, gradient in gradients.items()}
        factors = {path: np.ones(leaf.shape) for path, leaf in params.items()}
        for layer, multiplier in zip(self.layers, self.multipliers, strict=True):
            for path in (layer.path, *layer.follows):
                part = slice(None)
                if layer.part is not None:
                    axis, start, stop = layer.part
                    part = (slice(None),) * axis + (slice(start, stop),)
                factors[path][layer.index or part] = multiplier
        updates = {}
        for path, total in self.sum.items():
            self.trace[path] = MOMENTUM * self.trace.get(path, 0) + total
            updates[path] = -RATE * self.trace[path] * factors[path]
        self.sum = {}
        return updates

    def refresh(self, params):
        """The published map of the alphas, of the layers that have a tail."""
        alphas = []
        for layer in self.layers:
            eigenvalues = spectra.eigenvalues_of(params[layer.path], layer)
            enough = len(eigenvalues) >= LEAST
            law = reference.fit_median(eigenvalues) if enough else None
            alphas.append(law.alpha if law else np.nan)
        return reference.multipliers(np.asarray(alphas), "tb_linear_map", 0.5, 1.5)


@st.composite
def runs(draw, cases):
    """A case, seeds, and before which steps the state is saved and restored."""
    steps = draw(st.integers(1, 6))
    restarts = draw(st.sets(st.integers(1, 6), max_size=2))
    return draw(st.sampled_from(cases)), draw(st.integers(0, 2**20)), steps, restarts


def restored(tx, state, params):
    """The state as a checkpoint would give it back."""
    saved = jax.tree.map(np.array, state)
    target = jax.eval_shape(tx.init, params)
    return jax.tree.map(lambda t, leaf: jnp.asarray(leaf, t.dtype), target, saved)


def check(run):
    case, seed, steps, restarts = run
    dtype = case[3]
    tx, update, layers = compiled(case)
    params = draw_tree(TREES[case[0]][0], seed, dtype)
    state, model = tx.init(params), Model(case, layers)
    eps = float(jnp.finfo(dtype).eps)
    for step in range(steps):
        if step in restarts:
            state = restored(tx, state, params)
        gradient = gradients(params, seed + step)
        expected = model.update(by_path(gradient), by_path(params))
        updates, state = update(gradient, state, params)
        multipliers = np.asarray(tb_optax.get_multipliers(state))
        np.testing.assert_allclose(multipliers, model.multipliers, atol=2e-3)
        assert tb_optax.get_state(state).count == step + 1
        for path, leaf in by_path(updates).items():
            scale = RATE * 10 * (4 * eps * (step + 1) + 2e-3)
            np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=scale)
        for one, other in zip(
            jax.tree.leaves(updates), jax.tree.leaves(params), strict=True
        ):
            # Optax makes a float of a whole number's update.
            if jnp.issubdtype(other.dtype, jnp.floating):
                assert one.dtype == other.dtype
        params = optax.apply_updates(params, updates)


@hypothesis.settings(spectra.PROFILE, max_examples=60)
@given(runs(FEW))
def test_the_whole_optimizer(run):
    check(run)


@pytest.mark.long
@hypothesis.settings(spectra.PROFILE, max_examples=500)
@given(runs(CASES))
def test_the_whole_optimizer_at_length(run):
    check(run)
