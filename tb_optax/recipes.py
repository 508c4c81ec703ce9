"""Published methods of the family, each in a few public parts.

Every recipe takes the layers, the interval and the published constants, and returns the
transform that ends a chain; after one with a `weight_decay` comes the learning rate
alone. docs/family.md compares them.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tb_optax.analysis import Analysis, layer_analysis
from tb_optax.checks import check_int, check_number
from tb_optax.layers import Layer
from tb_optax.maps import Groups, by_block, linear, sigmoid
from tb_optax.power_law import fit_median
from tb_optax.submatrices import windows
from tb_optax.transform import add_balanced_weight_decay, scale_by_temp_balance

__all__ = [
    "alpha_decay",
    "farms",
    "largest_at_ends",
    "llr",
    "model_balancing",
    "temp_balance",
]


def temp_balance(
    layers: Sequence[Layer] | None = None,
    *,
    interval: int | None,
    low: int | float = 0.5,
    high: int | float = 1.5,
    min_eigenvalues: int = 50,
) -> optax.GradientTransformationExtraArgs:
    r"""Balance learning rates by alpha (TempBalance).

        m_i = low + (high - low)·(alpha_i - min alpha) / (max alpha - min alpha)

    Use it for convolutional networks that are trained from scratch by SGD with
    momentum. It costs one eigendecomposition of each layer per interval.

    Deviations: layers with equal exponents keep 1, where the published code gives all
    of them `high`; a layer that cannot be fitted keeps 1 and changes no other.

    Args:
        layers: the layers to tune; published: without the first and the last.
        interval: updates between two refreshes; published: an epoch.
        low: multiplier of the smallest alpha.
        high: multiplier of the largest.
        min_eigenvalues: a layer with fewer keeps 1.

    Returns:
        A transform to be chained after the optimizer.

    Raises:
        ValueError: if a number is out of its range.

    >>> import jax
    >>> key = jax.random.key(0)
    >>> params = {"a": {"kernel": jax.random.normal(key, (104, 104))},
    ...           "b": {"kernel": jax.random.normal(key, (104, 208)) ** 3}}
    >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), temp_balance(interval=100))
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(state[1].multipliers.round(1))
    [0.5 1.5]

    References:
        Zhou et al, `Temperature Balancing, Layer-wise Weight Analysis, and Neural
        Network Training <https://arxiv.org/abs/2312.00359>`_, 2023
    """
    analyze = layer_analysis(
        layers, assign=linear(low, high), min_eigenvalues=min_eigenvalues
    )
    return scale_by_temp_balance(analyze, interval=interval)


def farms(
    layers: Sequence[Layer] | None = None,
    *,
    interval: int | None,
    ratio: int | float = 1.0,
    rows: int = 100,
    count: int = 9,
    low: int | float = 0.1,
    high: int | float = 1.9,
    min_eigenvalues: int = 5,
) -> optax.GradientTransformationExtraArgs:
    r"""Balance learning rates by alphas of windows of one aspect ratio (FARMS).

    The map is that of `temp_balance`, alpha that of `windows(ratio, rows, count)`.

    Use it where layers differ in aspect ratio: at initialization, alpha depends on
    nothing else. On convolutions it costs no more than `temp_balance`; for each linear
    layer it decomposes up to count² windows.

    Deviations: those of `temp_balance`, and those of `windows`, which has
    `published=True` to undo them.

    Args:
        layers: the layers to tune.
        interval: updates between two refreshes; published: an epoch.
        ratio: inputs of a window for each of its outputs.
        rows: outputs of a window of a linear layer.
        count: most windows along each side of a linear layer.
        low: multiplier of the smallest alpha; published from 0.1 (ResNet-18) to 0.4.
        high: multiplier of the largest; published from 1.6 to 1.9.
        min_eigenvalues: a layer with fewer keeps 1.

    Returns:
        A transform to be chained after the optimizer.

    Raises:
        ValueError: if a number is out of its range.

    >>> import jax
    >>> key = jax.random.key(0)
    >>> params = {"a": {"kernel": jax.random.normal(key, (104, 104))},
    ...           "b": {"kernel": jax.random.normal(key, (104, 208)) ** 3}}
    >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), farms(interval=100))
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(state[1].multipliers.round(1))
    [1.9 0.1]

    References:
        Hu et al, `Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias
        <https://arxiv.org/abs/2506.06280>`_, 2025
    """
    analyze = layer_analysis(
        layers,
        assign=linear(low, high),
        windows=windows(ratio, rows, count),
        min_eigenvalues=min_eigenvalues,
    )
    return scale_by_temp_balance(analyze, interval=interval)


def alpha_decay(
    layers: Sequence[Layer] | None = None,
    *,
    weight_decay: int | float = 1e-5,
    interval: int | None = 500,
    low: int | float = 2 / 3,
    high: int | float = 3.0,
    mask: Any = None,
    min_eigenvalues: int = 50,
) -> optax.GradientTransformationExtraArgs:
    r"""Balance the weight decay by alpha (AlphaDecay).

        u <- u + weight_decay·m_i·p,   m as in `temp_balance`,

    so that a layer with a larger alpha decays more; what is not tuned has the plain
    decay.

    Use it to pretrain transformers. Place it between Adam and the learning rate
    (decoupled, as AdamW), or before Adam (an L2 penalty).

    Deviations: those of `temp_balance`; refreshes are at counts 0, interval, ..., where
    the published loop has 0, interval - 1, 2·interval - 1, ...

    Args:
        layers: the layers to tune; published: all linear ones but the first and last.
        weight_decay: coefficient of the decay.
        interval: updates between two refreshes.
        low: multiplier of the smallest alpha; published: 0.6666.
        high: multiplier of the largest; published: 3 with the decay 1e-5, else 5.
        mask: the leaves that decay, as in `optax.add_decayed_weights`; None is all.
        min_eigenvalues: a layer with fewer keeps the plain decay.

    Returns:
        A transform to be chained after Adam and before the learning rate.

    Raises:
        ValueError: if a number is out of its range.

    >>> import jax
    >>> key = jax.random.key(0)
    >>> params = {"a": {"kernel": jax.random.normal(key, (104, 104))},
    ...           "b": {"kernel": jax.random.normal(key, (104, 208)) ** 3}}
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(),
    ...     alpha_decay(weight_decay=0.1, low=0.5),
    ...     optax.scale_by_learning_rate(0.1),
    ... )
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(state[1].multipliers.round(1))
    [0.5 3. ]

    References:
        He et al, `AlphaDecay: Module-wise Weight Decay for Heavy-Tailed Balancing in
        LLMs <https://arxiv.org/abs/2506.14562>`_, 2025
    """
    analyze = layer_analysis(
        layers, assign=linear(low, high), min_eigenvalues=min_eigenvalues
    )
    return add_balanced_weight_decay(
        weight_decay, analyze, interval=interval, mask=mask
    )


def model_balancing(
    layers: Sequence[Layer] | None = None,
    *,
    interval: int | None = 100,
    below: int | float = 2.0,
    above: int | float = 1.0,
    temperature: int | float = 10.0,
    position: int | float = 1.5,
    groups: Groups | None = by_block,
    weight_decay: int | float = 0.0,
    mask: Any = None,
    min_eigenvalues: int = 50,
) -> optax.GradientTransformationExtraArgs:
    r"""Balance the learning rates of blocks by a sigmoid of alpha (Model Balancing).

    With A_b the mean alpha of block b, and x_b = A_b - mean A,

        m_b = 10^(s·(1 / (1 + exp(-temperature·x_b)) - 1/2)),

    s = above where x_b > 0 and below elsewhere. The multipliers are near 1 while the
    blocks are alike.

    Use it to fine-tune transformers on little data. With a `weight_decay` it balances
    both, as the published hybrid does, and belongs between Adam and the learning rate.

    Deviations: a refresh takes effect in its own update, one earlier than published;
    `encoder.block.0` and `decoder.block.0` are two blocks; layers that are too small
    or cannot be fitted are left out of their block's mean and keep 1, where published
    training stops.

    Args:
        layers: the layers to tune; published: without the last.
        interval: updates between two refreshes; published: a tenth of an epoch, at
            most 100.
        below: exponent below the mean, s.
        above: exponent above the mean, s.
        temperature: steepness of the sigmoid.
        position: where the tail starts: 1.5 is the upper third of the spectrum.
        groups: a function from `Layer` to the name of its block; None is layer by
            layer.
        weight_decay: coefficient of a balanced decay.
        mask: the leaves that decay, as in `optax.add_decayed_weights`; None is all.
        min_eigenvalues: a layer with fewer keeps 1.

    Returns:
        A transform to be chained after the optimizer; with a decay, after Adam and
        before the learning rate.

    Raises:
        ValueError: if a number is out of its range.

    >>> import jax
    >>> key = jax.random.key(0)
    >>> params = {"a": {"kernel": jax.random.normal(key, (104, 104))},
    ...           "b": {"kernel": jax.random.normal(key, (104, 208)) ** 3}}
    >>> tx = optax.chain(optax.adam(0.1), model_balancing(groups=None))
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(state[1].multipliers.round())
    [0. 2.]

    References:
        Liu et al, `Model Balancing Helps Low-data Training and Fine-tuning
        <https://arxiv.org/abs/2410.12178>`_, 2024
    """
    analyze = layer_analysis(
        layers,
        fit=fit_median(position),
        assign=sigmoid(below, above, temperature),
        groups=groups,
        min_eigenvalues=min_eigenvalues,
    )
    return scale_by_temp_balance(
        analyze, interval=interval, weight_decay=weight_decay, mask=mask
    )


def llr(
    layers: Sequence[Layer] | None = None,
    *,
    total_steps: int,
    interval: int = 40,
    low: int | float = 1.0,
    high: int | float = 3.0,
    share: int | float = 0.2,
    ramp: int = 21,
    ends: Sequence[str] = ("*embed*", "*head*"),
    min_eigenvalues: int = 50,
) -> optax.GradientTransformationExtraArgs:
    r"""Raise learning rates by alpha in the first fifth of a training (LLR).

    The map is that of `temp_balance`. Embeddings and head count with the largest alpha
    of the other layers, and so have the multiplier `high`. A refresh takes effect over
    `ramp` updates; the last is in the first `share` of the training.

    Use it to pretrain transformers with AdamW. `trace_layers` and `find_layers` list no
    embeddings: add them. Followers are left out: norms and biases keep 1, the smallest
    multiplier where `low` is 1.

    Deviations: refreshes are at counts 0, interval, ..., where the published loop has
    0, interval - 1, ...; multipliers move linearly and the schedule goes on, where the
    published rates move linearly to their value at the end of the ramp; the last
    refresh is kept, and no schedule runs late or starts again after the last ramp; an
    embedding or head with too few eigenvalues keeps 1.

    Args:
        layers: the layers to tune, embeddings and head included.
        total_steps: updates of the whole training, an int >= 1.
        interval: updates between two refreshes; published: 40, or 100 for 1B.
        low: multiplier of the smallest alpha.
        high: multiplier of the largest; published: 3, or 5 for 1B.
        share: of the training in which refreshes are, a number >= 0 and < 1.
        ramp: updates over which multipliers move; published: 21, or 51 for 1B.
        ends: patterns of the paths of embeddings and head.
        min_eigenvalues: a layer with fewer keeps 1.

    Returns:
        A transform to be chained after the optimizer.

    Raises:
        ValueError: if a number is out of its range.

    >>> import jax
    >>> key = jax.random.key(0)
    >>> params = {"a": {"kernel": jax.random.normal(key, (104, 104))},
    ...           "b": {"kernel": jax.random.normal(key, (104, 208)) ** 3}}
    >>> tx = optax.chain(optax.adamw(0.1), llr(total_steps=1000, ramp=0))
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(state[1].multipliers.round(1))
    [1. 3.]

    References:
        `One LR Doesn't Fit All <https://arxiv.org/abs/2605.22297>`_, 2026
    """
    check_int("total_steps", total_steps, at_least=1)
    check_number("share", share, at_least=0, below=1)
    if layers is not None:
        layers = [dataclasses.replace(layer, follows=()) for layer in layers]
    analyze = layer_analysis(
        layers,
        metric=largest_at_ends(tuple(ends)),
        assign=linear(low, high),
        min_eigenvalues=min_eigenvalues,
    )
    stop = max(0, math.floor(share * total_steps) - 1)
    return scale_by_temp_balance(analyze, interval=interval, stop=stop, ramp=ramp)


@dataclasses.dataclass(frozen=True)
class largest_at_ends:
    """The metric of `llr`: alpha, and for some layers the largest of the others.

    Args:
        patterns: of the paths of the layers that get the largest.
    """

    patterns: tuple[str, ...]

    def __call__(self, analysis: Analysis) -> Float[Array, " layers"]:
        """Return one number per layer."""

        def is_end(layer):
            return any(fnmatch.fnmatchcase(layer.path, p) for p in self.patterns)

        ends = np.asarray([is_end(layer) for layer in analysis.layers])
        others = analysis.fitted & ~ends
        largest = jnp.max(analysis.alpha, initial=0, where=others)
        return jnp.where(ends & (largest > 0), largest, analysis.alpha)
