"""Maps from metric to multipliers, and from layers to leaves."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import spectra
from hypothesis import given
from hypothesis import strategies as st
from spectra import float32

from tb_optax import Layer, MatrixAxes, linear, log2, sqrt, step
from tb_optax.analysis import leaf_multipliers
from tb_optax.layers import expand_stacks, layer_of_leaf

EPS = float(np.finfo(np.float32).eps)
MAPS = (linear(), linear(1.2, 0.3), sqrt(), log2(), step(), step(2, 0.25))
PUBLISHED = {
    linear: "tb_linear_map",
    sqrt: "tb_sqrt",
    log2: "tb_log2",
    step: "tb_step",
}


def apply(assign, metric, tuned=None):
    """The map of float32 scores, all of them tuned unless told otherwise."""
    metric = np.asarray(metric, np.float32)
    tuned = np.ones(len(metric), bool) if tuned is None else np.asarray(tuned)
    multipliers = jax.jit(assign)(jnp.asarray(metric), jnp.asarray(tuned))
    assert multipliers.dtype == jnp.float32
    assert multipliers.shape == metric.shape
    return np.asarray(multipliers)


def scores(seed, count=9):
    """Distinct scores above 1, in the domain of every map, in no order."""
    return np.random.default_rng(seed).permutation(np.linspace(1.3, 7.9, count))


# --- all maps -----------------------------------------------------------------------


@pytest.mark.parametrize("assign", MAPS, ids=repr)
def test_published_formula(assign):
    """In float32; the property has any scores in 64 bit."""
    metric = scores(0).astype(np.float32)
    low, high = getattr(assign, "low", 0), getattr(assign, "high", 0)
    expected = reference.multipliers(metric, PUBLISHED[type(assign)], low, high)
    # Sums and quotients of n positive terms: n roundings of eps/2, and a few more.
    np.testing.assert_allclose(apply(assign, metric), expected, rtol=len(metric) * EPS)


@pytest.mark.parametrize("assign", MAPS, ids=repr)
def test_equal_scores_give_one(assign):
    """Equal up to rounding, max - min <= 8·eps·max, as rounding noise would be."""
    for value in (0.0, 1.0, 3.7, 1e20):
        if isinstance(assign, log2) and value < 1:
            continue
        same = np.full(5, value, np.float32)
        np.testing.assert_array_equal(apply(assign, same), 1)
        nearly = same * np.linspace(1, 1 + 6 * EPS, 5, dtype=np.float32)
        np.testing.assert_array_equal(apply(assign, nearly), 1)


@pytest.mark.parametrize("assign", [linear(), step()], ids=repr)
def test_scores_just_apart_are_mapped(assign):
    apart = float32([1.0, 1 + 16 * EPS])
    assert apply(assign, apart)[0] == 0.5
    together = float32([1.0, 1 + 8 * EPS])
    np.testing.assert_array_equal(apply(assign, together), 1)


@pytest.mark.parametrize("assign", MAPS, ids=repr)
def test_one_tuned_layer_or_none_gets_one(assign):
    for tuned in (np.arange(9) == 3, np.zeros(9, bool)):
        np.testing.assert_array_equal(apply(assign, scores(1), tuned), 1)
    assert apply(assign, []).shape == (0,)


@pytest.mark.parametrize("assign", MAPS, ids=repr)
@pytest.mark.parametrize("value", [0.0, -1e30, 1e30, math.inf, -math.inf, math.nan])
def test_untuned_layers_get_one_and_no_influence(assign, value):
    """Whatever stands in their place, the others are mapped as if alone."""
    metric, tuned = scores(2), np.arange(9) % 3 > 0
    alone = apply(assign, metric[tuned])
    metric[~tuned] = value
    with jax.debug_nans(not math.isnan(value)):
        mapped = apply(assign, metric, tuned)
    np.testing.assert_array_equal(mapped[~tuned], 1)
    # The sum of a longer vector may be rounded otherwise.
    np.testing.assert_allclose(mapped[tuned], alone, rtol=9 * EPS)


SCORES = st.one_of(st.floats(-8, 64, width=32), st.integers(0, 3).map(float))


@spectra.PROFILE
@given(
    st.lists(st.tuples(SCORES, st.booleans()), min_size=7, max_size=7),
    st.sampled_from(MAPS),
)
@pytest.mark.usefixtures("x64")
def test_any_scores_with_any_mask(rows, assign):
    """Against the reference in float64, the tuned layers only; untuned ones are 1.

    Outside the domain of a map is NaN; ties are ranked in the order of the layers.
    """
    metric, tuned = (np.asarray(column) for column in zip(*rows, strict=True))
    multipliers = np.asarray(
        jax.jit(assign)(jnp.asarray(metric, jnp.float64), jnp.asarray(tuned))
    )
    assert multipliers.dtype == np.float64
    low, high = getattr(assign, "low", 0), getattr(assign, "high", 0)
    kind = PUBLISHED[type(assign)]
    outside = tuned & (metric < reference.DOMAIN[kind])
    assert np.isnan(multipliers[outside]).all()
    expected = reference.multipliers(np.where(tuned, metric, np.nan), kind, low, high)
    np.testing.assert_allclose(
        multipliers[~outside], expected[~outside], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 1.5), (0, 1), (1.5, 0.5), (1, 1), (0.1, 1.9), (0, 0)]
)
def test_linear_reaches_its_bounds_and_stays_between(low, high):
    metric = scores(7)
    mapped = apply(linear(low, high), metric)
    least, most = sorted((low, high))
    ulp = EPS * max(low, high)
    assert mapped[np.argmin(metric)] == float32(low)
    assert mapped[np.argmax(metric)] == pytest.approx(high, abs=ulp)
    assert (mapped >= least - ulp).all()
    assert (mapped <= most + ulp).all()


# --- layers to leaves ---------------------------------------------------------------

DENSE = MatrixAxes((0,), (1,))
SCANNED = MatrixAxes((1,), (2,), stacked=(0,))
GRID = MatrixAxes((2,), (3,), stacked=(0, 1))
HEADS = MatrixAxes((0,), (1, 2))
CONV = MatrixAxes((1,), (0,), pooled=(2, 3))


def qkv(axes, axis, size, follows, **rest):
    """Three equal parts of an output axis."""
    cuts = itertools.pairwise(range(0, 3 * size + 1, size))
    return [Layer("w", axes, follows, part=(axis, *cut), **rest) for cut in cuts]


# Layers, shapes of the leaves, expected owner of every entry of the followers.
OWNERS = {
    "plain": ([Layer("w", DENSE, ("b", "s"))], {"w": (4, 6), "b": (6,), "s": ()}, {}),
    "scanned": (
        [Layer("w", SCANNED, ("b",))],
        {"w": (3, 4, 6), "b": (3, 6)},
        {"w": lambda index: index[0], "b": lambda index: index[0]},
    ),
    "some slices": (
        [Layer("w", SCANNED, ("b",), index=(i,)) for i in (2, 0)],
        {"w": (4, 4, 6), "b": (4, 6)},
        {leaf: lambda index: {2: 0, 0: 1}.get(index[0], -1) for leaf in "wb"},
    ),
    "grid": (
        [Layer("w", GRID, ("b",))],
        {"w": (2, 3, 4, 6), "b": (2, 3, 6)},
        {leaf: lambda index: 3 * index[0] + index[1] for leaf in "wb"},
    ),
    "parts": (
        qkv(DENSE, 1, 4, ("b",)),
        {"w": (5, 12), "b": (12,)},
        {"w": lambda index: index[1] // 4, "b": lambda index: index[0] // 4},
    ),
    "parts of heads": (
        qkv(HEADS, 1, 2, ("b",)),
        {"w": (5, 6, 8), "b": (6, 8)},
        {"w": lambda index: index[1] // 2, "b": lambda index: index[0] // 2},
    ),
    "parts of convolutions": (
        qkv(CONV, 0, 2, ("b",)),
        {"w": (6, 5, 3, 3), "b": (6, 1, 1)},
        {leaf: lambda index: index[0] // 2 for leaf in "wb"},
    ),
    "parts of slices": (
        qkv(SCANNED, 2, 2, ("b",)),
        {"w": (4, 5, 6), "b": (4, 6)},
        {
            "w": lambda index: 4 * (index[2] // 2) + index[0],
            "b": lambda index: 4 * (index[1] // 2) + index[0],
        },
    ),
}


@pytest.mark.parametrize("case", OWNERS)
def test_owner_of_every_entry(case):
    layers, shapes, owners = OWNERS[case]
    layers = expand_stacks(layers, shapes)
    found = layer_of_leaf(layers, shapes)
    numbers = jnp.arange(1.0, len(layers) + 1)
    by_path = leaf_multipliers(found, numbers)
    assert set(found) == set(by_path) == set(shapes)
    for path, shape in shapes.items():
        assert found[path].ndim == len(shape)
        owner = np.broadcast_to(found[path], shape)
        multiplier = np.broadcast_to(by_path[path], shape)
        for index in np.ndindex(shape):
            expected = owners.get(path, lambda _: 0)(index)
            assert owner[index] == expected
            assert multiplier[index] == (1 if expected < 0 else expected + 1)


def test_leaves_of_no_layer_and_masked_followers_are_left_out():
    layers = [Layer("w", DENSE, ("b", "m"))]
    shapes = {"w": (4, 6), "b": (6,), "m": None, "other": (3, 3)}
    assert set(layer_of_leaf(layers, shapes)) == {"w", "b"}
