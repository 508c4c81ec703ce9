"""Maps from a metric of the layers to their multipliers.

A map is a function `(metric, tuned) -> multipliers` over vectors with one entry per
layer. Only tuned layers take part in its minimum, maximum, sum or ranking; it returns 1
for the others and NaN for a tuned layer outside its domain. A map with the attribute
`needs_layers = True` is called with a third argument, one pair `(Layer, size)` per
entry, size being the number of its weights. Those here are frozen dataclasses, so that
equal maps share one compilation.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tb_optax.checks import check_function, check_number
from tb_optax.layers import Layer

Vector: TypeAlias = Float[Array, " layers"]
Mask: TypeAlias = Bool[Array, " layers"]
# Of `(metric, tuned)`, or of `(metric, tuned, rows)` where it needs the layers.
Assign: TypeAlias = Callable[..., Vector]
Rows: TypeAlias = Sequence[tuple[Layer, int]]
Groups: TypeAlias = Callable[[Layer], str | None]


@dataclasses.dataclass(frozen=True)
class linear:
    """Map the metric's range linearly onto [low, high] (`tb_linear_map`).

        low + (high - low)·(M - min M) / (max M - min M),

    and 1 for every layer where the scores are equal up to rounding
    (max - min <= 8·eps·max |M|), which includes a single tuned layer.

    Args:
        low: multiplier of the smallest metric, finite and >= 0.
        high: multiplier of the largest; low > high reverses the map.

    Raises:
        ValueError: if a bound is not a finite number >= 0.

    >>> print(linear(0.5, 1.5)(jnp.asarray([2.0, 4.0, 3.0]), jnp.ones(3, bool)))
    [0.5 1.5 1. ]
    """

    low: int | float = 0.5
    high: int | float = 1.5

    def __post_init__(self):
        check_number("low", self.low, at_least=0)
        check_number("high", self.high, at_least=0)

    def __call__(self, metric: Vector, tuned: Mask) -> Vector:
        """Return the multipliers of the layers."""
        low, high, spread = _extremes(metric, tuned)
        position = (metric - low) / jnp.where(spread, high - low, 1)
        multipliers = self.low + (self.high - self.low) * position
        return jnp.where(tuned & spread, multipliers, 1)


@dataclasses.dataclass(frozen=True)
class sqrt:
    """Multipliers proportional to the square root of the metric (`tb_sqrt`).

        n·sqrt(M_i) / Σ_j sqrt(M_j) over the n tuned layers with M >= 0,

    so that their mean is 1; NaN for a tuned layer with M < 0, and 1 for every other
    one where their scores are equal up to rounding.

    >>> print(sqrt()(jnp.asarray([1.0, 9.0, 4.0]), jnp.ones(3, bool)))
    [0.5 1.5 1. ]
    """

    def __call__(self, metric: Vector, tuned: Mask) -> Vector:
        """Return the multipliers of the layers."""
        return _share(jnp.sqrt, metric, tuned, metric >= 0)


@dataclasses.dataclass(frozen=True)
class log2:
    """Multipliers proportional to the logarithm of the metric (`tb_log2`).

        n·log2(M_i) / Σ_j log2(M_j) over the n tuned layers with M >= 1,

    so that their mean is 1; NaN for a tuned layer with M < 1, whose share would
    be negative, and 1 for every other one where their scores are equal up to
    rounding.

    >>> print(log2()(jnp.asarray([2.0, 8.0, 4.0]), jnp.ones(3, bool)))
    [0.5 1.5 1. ]
    """

    def __call__(self, metric: Vector, tuned: Mask) -> Vector:
        """Return the multipliers of the layers."""
        return _share(jnp.log2, metric, tuned, metric >= 1)


@dataclasses.dataclass(frozen=True)
class step:
    """Multipliers by rank alone (`tb_step`).

        low + (high - low)·r / n for rank r = 0..n-1, ascending,

    so that `high` is never reached, as published; 1 for every layer where the
    scores are equal up to rounding.  Ties rank in the order of the layers.

    Args:
        low: multiplier of the smallest metric, finite and >= 0.
        high: bound of the multipliers from the other side, finite and >= 0.

    Raises:
        ValueError: if a bound is not a finite number >= 0.

    >>> print(step(0.5, 1.5)(jnp.asarray([2.0, 9.0]), jnp.ones(2, bool)))
    [0.5 1. ]
    """

    low: int | float = 0.5
    high: int | float = 1.5

    def __post_init__(self):
        check_number("low", self.low, at_least=0)
        check_number("high", self.high, at_least=0)

    def __call__(self, metric: Vector, tuned: Mask) -> Vector:
        """Return the multipliers of the layers."""
        _, _, spread = _extremes(metric, tuned)
        order = jnp.argsort(jnp.where(tuned, metric, jnp.inf), stable=True)
        rank = jnp.argsort(order).astype(metric.dtype)
        count = jnp.maximum(tuned.sum(dtype=metric.dtype), 1)
        multipliers = self.low + (self.high - self.low) * rank / count
        return jnp.where(tuned & spread, multipliers, 1)


@dataclasses.dataclass(frozen=True)
class sigmoid:
    r"""Powers of ten that grow with the distance from the mean (`TB_Sigmoid`).

        10^(s·(1 / (1 + exp(-temperature·x)) - 1/2)),   x = M - mean M,

    s = `above` where x > 0 and `below` elsewhere, so that all multipliers lie between
    10^(-below/2) and 10^(above/2), and near 1 where the scores are close together.

    Args:
        below: exponent for scores below the mean, finite and >= 0.
        above: exponent for scores above it, finite and >= 0.
        temperature: steepness, in units of 1 / metric, finite and > 0.

    Raises:
        ValueError: if a number is out of its range.

    >>> print(sigmoid()(jnp.asarray([2.0, 2.0, 5.0]), jnp.ones(3, bool)).round(1))
    [0.1 0.1 3.2]

    References:
        Liu et al, `Model Balancing Helps Low-data Training and Fine-tuning
        <https://arxiv.org/abs/2410.12178>`_, 2024
    """

    below: int | float = 2.0
    above: int | float = 1.0
    temperature: int | float = 10.0

    def __post_init__(self):
        check_number("below", self.below, at_least=0)
        check_number("above", self.above, at_least=0)
        check_number("temperature", self.temperature, above=0)

    def __call__(self, metric: Vector, tuned: Mask) -> Vector:
        """Return the multipliers of the layers."""
        _, _, spread = _extremes(metric, tuned)
        x = metric - _mean(metric, tuned)
        share = jax.nn.sigmoid(self.temperature * x) - 0.5
        exponent = jnp.where(x > 0, self.above, self.below) * share
        return jnp.where(tuned & spread, 10**exponent, 1).astype(metric.dtype)


@dataclasses.dataclass(frozen=True)
class standard_sigmoid:
    r"""Multipliers between 0 and 2 by the standard score (`layerwise_sigmoid`).

        2 / (1 + exp(-temperature·z)),   z = (M - mean M) / (std M + 1e-8),

    with the population's standard deviation. AlphaDecay takes z within each block:
    `nested(None, standard_sigmoid())`.

    Args:
        temperature: steepness, finite and > 0.

    Raises:
        ValueError: if temperature is not a finite number > 0.

    >>> print(standard_sigmoid()(jnp.asarray([2.0, 3.0]), jnp.ones(2, bool)).round(1))
    [0. 2.]

    References:
        He et al, `AlphaDecay: Module-wise Weight Decay for Heavy-Tailed Balancing in
        LLMs <https://arxiv.org/abs/2506.14562>`_, 2025
    """

    temperature: int | float = 4.0

    def __post_init__(self):
        check_number("temperature", self.temperature, above=0)

    def __call__(self, metric: Vector, tuned: Mask) -> Vector:
        """Return the multipliers of the layers."""
        _, _, spread = _extremes(metric, tuned)
        x = jnp.where(tuned, metric - _mean(metric, tuned), 0)
        deviation = jnp.sqrt(_mean(x**2, tuned))
        z = x / (deviation + 1e-8)
        multipliers = 2 * jax.nn.sigmoid(self.temperature * z)
        return jnp.where(tuned & spread, multipliers, 1).astype(metric.dtype)


@dataclasses.dataclass(frozen=True)
class mean_one:
    r"""Any map, divided by the mean of its multipliers over the tuned layers.

        f_i / mean f   or, weighted by the numbers of weights,  f_i·Σ w / Σ w f,

    so that the mean is 1, whatever the map makes of it. With `groups`, each tuned
    layer counts, not each group. Multipliers of mean 0 stay as they are.

    Args:
        assign: the map f.
        by_size: whether the mean is weighted by the numbers of weights; times a target,
            `mean_one(linear(1 - epsilon, 1 + epsilon), by_size=True)` is the map of
            AlphaPruning.
        ungrouped: whether layers that `groups` gives no name are in the mean, with the
            multiplier 1, and divided by it too, as Model Balancing does.

    Raises:
        ValueError: if assign is no function.

    >>> print(mean_one(linear(1, 2))(jnp.asarray([2.0, 4.0, 3.0]), jnp.ones(3, bool)))
    [0.6666667 1.3333334 1.       ]

    References:
        Lu et al, `AlphaPruning: Using Heavy-Tailed Self Regularization Theory for
        Improved Layer-wise Pruning of Large Language Models
        <https://arxiv.org/abs/2410.10912>`_, 2024
    """

    assign: Assign
    by_size: bool = False
    ungrouped: bool = False

    def __post_init__(self):
        check_function("assign", self.assign)

    @property
    def needs_layers(self) -> bool:
        """Whether it is to be called with the layers."""
        return self.by_size or getattr(self.assign, "needs_layers", False)

    def __call__(self, metric: Vector, tuned: Mask, rows: Rows = ()) -> Vector:
        """Return the multipliers of the layers."""
        multipliers = apply_map(self.assign, metric, tuned, rows)
        counted = tuned & jnp.isfinite(multipliers)
        sizes = [size if self.by_size else 1 for _, size in rows] or 1
        weights = np.asarray(sizes, float) / np.max(sizes)
        weights = jnp.where(counted, jnp.asarray(weights, metric.dtype), 0)
        total = jnp.sum(weights * jnp.where(counted, multipliers, 0))
        scaled = multipliers * (weights.sum() / jnp.where(total > 0, total, 1))
        return jnp.where(counted & (total > 0), scaled, multipliers)


def by_block(layer: Layer) -> str | None:
    """Name the block of a layer: its path up to the first number in it.

    A number ends a part of the path, parts being separated by "/", "." and "_". Where
    there is none, a slice of a stack is in the block of its index, which it shares with
    the slices of equal index of other stacks. Any other layer is in no block: None.

    >>> from tb_optax import MatrixAxes
    >>> names = ["params/h_3/attn/kernel", "model.layers.11.mlp.weight", "head/kernel"]
    >>> [by_block(Layer(name, MatrixAxes((0,), (1,)))) for name in names]
    ['params/h_3', 'model.layers.11', None]
    """
    found = re.search(r"\d+(?=[/._]|$)", layer.path)
    if found:
        return layer.path[: found.end()]
    return f"[{','.join(map(str, layer.index))}]" if layer.index else None


@dataclasses.dataclass(frozen=True)
class nested:
    r"""One map of the blocks times another within each block.

        f(mean M of the block) · g(M within the block)

    where f is a map of all blocks, and the minimum, maximum or mean of g are those of
    one block's layers. Layers of no block keep 1.

    Args:
        blocks: the map f; None is 1 for all blocks.
        layers: the map g.
        groups: a function from `Layer` to the name of its block, or None.

    Raises:
        ValueError: if one of them is no function.

    >>> from tb_optax import MatrixAxes
    >>> rows = [(Layer(f"{i}/w", MatrixAxes((0,), (1,))), 1) for i in (0, 0, 1, 1)]
    >>> assign = nested(linear(0.5, 1.5), linear(0.9, 1.1))
    >>> metric = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    >>> print(assign(metric, jnp.ones(4, bool), rows).round(2))
    [0.45 0.55 1.35 1.65]

    References:
        Liu et al, `Model Balancing Helps Low-data Training and Fine-tuning
        <https://arxiv.org/abs/2410.12178>`_, 2024
    """

    blocks: Assign | None
    layers: Assign
    groups: Groups = by_block

    needs_layers: ClassVar[bool] = True

    def __post_init__(self):
        if self.blocks is not None:
            check_function("blocks", self.blocks)
        check_function("layers", self.layers)
        check_function("groups", self.groups)

    def __call__(self, metric: Vector, tuned: Mask, rows: Rows) -> Vector:
        """Return the multipliers of the layers."""
        place, members = _members(self.groups, rows)
        if not len(members):
            return jnp.ones_like(metric)

        def within(member):
            return apply_map(self.layers, metric, tuned & member, rows)

        inner = jax.vmap(within)(jnp.asarray(members))[place, np.arange(len(rows))]
        if self.blocks is not None:
            inner = inner * grouped(self.blocks, self.groups)(metric, tuned, rows)
        return jnp.where(jnp.asarray(place >= 0), inner, 1)


def apply_map(assign: Assign, metric, tuned, rows: Rows):
    """Call a map with the layers, if it needs them, or without."""
    if getattr(assign, "needs_layers", False):
        return assign(metric, tuned, rows)
    return assign(metric, tuned)


def grouped(assign: Assign, groups: Groups | None) -> Assign:
    """Return the map that gives all layers of a group the multiplier of their mean.

    A map that needs layers sees the first of each group, with the size of all.
    """
    if groups is None:
        return assign
    if isinstance(assign, mean_one):
        return dataclasses.replace(assign, assign=grouped(assign.assign, groups))
    return _Grouped(assign, groups)


@dataclasses.dataclass(frozen=True)
class _Grouped:
    """A map of the means of groups, as `grouped` makes it."""

    assign: Assign
    groups: Groups

    needs_layers: ClassVar[bool] = True

    def __call__(self, metric, tuned, rows):
        place, members = _members(self.groups, rows)
        if not len(members):
            return jnp.ones_like(metric)
        own = jnp.asarray(members) & tuned[None]
        means = jax.vmap(lambda mask: _mean(metric, mask))(own)
        sizes = np.asarray([size for _, size in rows])
        of_groups = [
            (rows[int(np.argmax(member))][0], int(sizes[member].sum()))
            for member in members
        ]
        values = apply_map(self.assign, means, own.any(axis=1), of_groups)
        return jnp.where(jnp.asarray(place >= 0), values[place], 1)


def _members(groups: Groups, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each layer, -1 for none, and which layers each group has."""
    names = [groups(layer) for layer, _ in rows]
    distinct = [name for name in dict.fromkeys(names) if name is not None]
    order = {name: i for i, name in enumerate(distinct)} | {None: -1}
    place = np.asarray([order[name] for name in names])
    return place, place == np.arange(len(distinct))[:, None]


def _mean(values, tuned):
    """Return the mean over the tuned layers; 1 where there is none."""
    count = tuned.sum(dtype=values.dtype)
    total = jnp.where(tuned, values, 0).sum()
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 1)


def _extremes(metric, tuned):
    """Find the smallest and largest tuned metric, and whether they truly differ."""
    low = jnp.min(metric, initial=jnp.inf, where=tuned)
    high = jnp.max(metric, initial=-jnp.inf, where=tuned)
    some = tuned.any()
    low, high = jnp.where(some, low, 0), jnp.where(some, high, 0)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return low, high, high - low > 8 * jnp.finfo(metric.dtype).eps * largest


def _share(score, metric, tuned, inside):
    """Return n·score(M) / Σ score(M) over the tuned layers inside the domain.

    It is NaN for the other tuned ones, and 1 where the metrics are equal but for
    rounding.
    """
    defined = tuned & inside
    _, _, spread = _extremes(metric, defined)
    scores = jnp.where(defined, score(jnp.where(defined, metric, 1)), 0)
    total = jnp.where(spread, scores.sum(), 1)
    shares = jnp.where(spread, defined.sum(dtype=scores.dtype) * scores / total, 1)
    return jnp.where(defined, shares, jnp.where(tuned, jnp.nan, 1))
