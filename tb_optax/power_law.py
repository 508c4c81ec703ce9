"""Power laws fitted to the tail of an empirical spectral density.

A fit is a function `(log_eigenvalues, valid) -> PowerLaw` over a table with one row per
layer. Those here are frozen dataclasses, so that equal fits share one compilation. Two
attributes tell the analysis what a fit needs:

- `whole_spectrum = True`: it looks below the median, and takes the slower route
  through singular values, which keeps the small eigenvalues exact.
- `absolute = True`: it depends on the unit of the eigenvalues. Every other fit
  is given eigenvalues in units of its layer's own scale, where float32 logarithms
  are most accurate, and its `xmin` is scaled back.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tb_optax.checks import check_int, check_number


class PowerLaw(NamedTuple):
    """The density p(λ) ∝ λ^-alpha for λ >= xmin, fitted to each layer.

    Attributes:
        alpha: exponent of the density; 0 where there is no tail to fit, infinity
            where the tail is a single value.
        xmin: smallest eigenvalue of the tail, in the unit of the input.
        ks_distance: Kolmogorov-Smirnov distance between fit and tail.
        tail_size: number of eigenvalues in the tail.
    """

    alpha: Float[Array, " layers"]
    xmin: Float[Array, " layers"]
    ks_distance: Float[Array, " layers"]
    tail_size: Int[Array, " layers"]


Logs: TypeAlias = Float[Array, "layers n"]
Mask: TypeAlias = Bool[Array, "layers n"]
Fit: TypeAlias = Callable[[Logs, Mask], PowerLaw]

# Candidate tails compared at once by the fits that try every xmin.
_CANDIDATES_AT_ONCE = 128

# Parts of the candidates, each of which leaves out the columns before its tails.
_PARTS = 4


@dataclasses.dataclass(frozen=True)
class fit_median:
    r"""Hill estimator over the upper part of the spectrum (`PL_Alpha_Hill`).

    With λ_0 <= ... <= λ_{N-1}, i = floor(N / position) and n = N - i,

        alpha = 1 + n / Σ_{j=i}^{N-1} ln(λ_j / xmin),

    where xmin = λ_i, as in the published code, or λ_{i-1}, as in the paper's text.
    It is invariant under W -> cW.

    Args:
        position: where the tail starts, a number > 1; 2 is the median.
        include_threshold: whether xmin is the smallest eigenvalue of the tail
            (True) or the one below it (False).

    Raises:
        ValueError: if position is not a finite number greater than 1.

    >>> quantiles = (1 - (jnp.arange(4096) + 0.5) / 4096) ** (-1 / (3.0 - 1))
    >>> log_eigenvalues = jnp.log(quantiles)[None]
    >>> law = fit_median()(log_eigenvalues, jnp.ones((1, 4096), bool))
    >>> print(round(float(law.alpha[0]), 2), int(law.tail_size[0]))
    3.0 2048

    References:
        Zhou et al, `Temperature Balancing, Layer-wise Weight Analysis, and Neural
        Network Training <https://arxiv.org/abs/2312.00359>`_, 2023
    """

    position: int | float = 2
    include_threshold: bool = True

    whole_spectrum: ClassVar[bool] = False
    absolute: ClassVar[bool] = False

    def __post_init__(self):
        check_number("position", self.position, above=1)

    def __call__(self, log_eigenvalues: Logs, valid: Mask) -> PowerLaw:
        """Fit every row; rows ascend, invalid entries come first."""
        width = log_eigenvalues.shape[-1]
        count = valid.sum(axis=-1)
        # A table, since a float32 quotient can land on the wrong side of an integer.
        below = np.floor(np.arange(width + 1) / self.position).astype(np.int32)
        size = count - jnp.asarray(below, count.dtype)[count]
        start = width - size
        threshold_column = start if self.include_threshold else start - 1
        threshold = jnp.take_along_axis(
            log_eigenvalues, jnp.clip(threshold_column, 0, width - 1)[:, None], axis=-1
        )[:, 0]
        fits = (size > 0) & (threshold_column >= width - count) & (threshold > -jnp.inf)
        threshold = jnp.where(fits, threshold, 0)
        rank = jnp.arange(width)[None] - start[:, None]
        tail = (rank >= 0) & fits[:, None]
        excess = jnp.where(tail, log_eigenvalues - threshold[:, None], 0)
        size = jnp.where(fits, size, 0)
        total = jnp.where(fits, excess.sum(axis=-1), 1)
        alpha = 1 + size.astype(total.dtype) / total
        number = jnp.maximum(size, 1)[:, None]
        distance = _ks_terms(excess, alpha[:, None], rank, number)
        return PowerLaw(
            alpha=jnp.where(fits, alpha, 0),
            xmin=jnp.where(fits, jnp.exp(threshold), 0),
            ks_distance=jnp.max(distance, axis=-1, initial=0, where=tail),
            tail_size=size,
        )

    def fit_weighted(
        self,
        log_nodes: Float[Array, "layers samples nodes"],
        weights: Float[Array, "layers samples nodes"],
        count: Int[np.ndarray, " layers"],
    ) -> PowerLaw:
        r"""Fit densities of which only weighted samples are known, as by `quadrature`.

        Half of the weight of each node is spread evenly, in ln λ, over the way to the
        node before it, half over the way to the next. With x(p) the quantiles of the
        mean of these densities,

            alpha = 1 + (n / N) / ∫ (x(p) - ln xmin) dp  over p from i / N to 1,

        and xmin is the quantile at (i + 1/2) / N, or at (i - 1/2) / N without the
        threshold: this is the fit of N eigenvalues, as N grows.

        Args:
            log_nodes: natural logarithms of the nodes, rows ascending, -inf for a zero.
            weights: of the nodes; those of a layer sum to 1.
            count: N, number of eigenvalues of each layer.

        Returns:
            PowerLaw; its ks_distance is 0, since single eigenvalues are not known.
        """
        start = np.floor(count / self.position)
        rank = start + (0.5 if self.include_threshold else -0.5)
        tail = jnp.asarray(1 - start / count, log_nodes.dtype)
        cells = _Cells.of(log_nodes, weights)
        probabilities = np.stack([start / count, rank / count])
        log_start, threshold = cells.quantiles(
            jnp.asarray(probabilities, log_nodes.dtype)
        )
        fits = (threshold > -jnp.inf) & (rank > 0)
        log_start = jnp.where(log_start > -jnp.inf, log_start, threshold)
        threshold = jnp.where(fits, threshold, 0)
        # What is cut off at `start` is measured from the threshold.
        rest = jnp.where(fits, log_start - threshold, 0)
        excess = cells.excess(log_start) + tail * rest
        rises = fits & (excess > 0)
        alpha = jnp.where(rises, 1 + tail / jnp.where(rises, excess, 1), jnp.inf)
        return PowerLaw(
            alpha=jnp.where(fits, alpha, 0),
            xmin=jnp.where(fits, jnp.exp(threshold), 0),
            ks_distance=jnp.zeros_like(alpha),
            tail_size=jnp.where(fits, jnp.asarray(count - start, jnp.int32), 0),
        )


@dataclasses.dataclass(frozen=True)
class fit_min_ks:
    """The tail whose power law has the smallest Kolmogorov-Smirnov distance.

    Every λ_i but the largest is tried as xmin, with the Hill estimate alpha(i) of
    the tail it starts and the distance D(i) between the two; the first smallest D
    wins. Invariant under W -> cW. Work grows with N² per layer.

    >>> log_eigenvalues = jnp.log(jnp.asarray([[1e-6, 1.0, 1.2, 1.5, 2.0, 4.0]]))
    >>> law = fit_min_ks()(log_eigenvalues, jnp.ones((1, 6), bool))
    >>> print(round(float(law.xmin[0]), 2), int(law.tail_size[0]))
    1.0 5

    References:
        Clauset et al, `Power-law distributions in empirical data
        <https://arxiv.org/abs/0706.1062>`_, 2009
    """

    whole_spectrum: ClassVar[bool] = True
    absolute: ClassVar[bool] = False

    def __call__(self, log_eigenvalues: Logs, valid: Mask) -> PowerLaw:
        """Fit every row; rows ascend, invalid entries come first."""
        return _min_ks(log_eigenvalues, valid, valid)


@dataclasses.dataclass(frozen=True)
class fit_peak:
    """As `fit_min_ks`, with xmin near the peak of the density ("fix-finger").

    The peak is 10 to the left edge of the first fullest bin of a histogram of
    log10 λ between its extremes. The window for xmin is

    - published: log10(0.95·peak) <= xmin <= 1.5·peak.  The lower bound compares a
      logarithm with an eigenvalue, so that it rarely binds and the result depends
      on the scale of the weights; the published code and WeightWatcher share it.
    - corrected: 0.95·peak <= xmin <= 1.5·peak, invariant under W -> cW.

    Args:
        bins: number of histogram bins, an int >= 1.
        published_window: True for the published window, False for the corrected.

    Raises:
        ValueError: if bins is not an int >= 1.

    >>> fit_peak(published_window=False)
    fit_peak(bins=100, published_window=False)

    References:
        Martin et al, `Predicting trends in the quality of state-of-the-art neural
        networks <https://www.nature.com/articles/s41467-021-24025-8>`_, 2021
    """

    bins: int = 100
    published_window: bool = True

    whole_spectrum: ClassVar[bool] = True

    def __post_init__(self):
        check_int("bins", self.bins, at_least=1)

    @property
    def absolute(self) -> bool:
        """Whether the fit depends on the unit of the eigenvalues."""
        return self.published_window

    def __call__(self, log_eigenvalues: Logs, valid: Mask) -> PowerLaw:
        """Fit every row; rows ascend, invalid entries come first."""
        counted = valid & (log_eigenvalues > -jnp.inf)
        logs = jnp.where(counted, log_eigenvalues, 0) / math.log(10)
        low = jnp.min(logs, axis=-1, initial=jnp.inf, where=counted)
        high = jnp.max(logs, axis=-1, initial=-jnp.inf, where=counted)
        some = counted.any(axis=-1)
        low, high = jnp.where(some, low, 0), jnp.where(some, high, 0)
        step = jnp.where(high > low, (high - low) / self.bins, 1)
        bins = jnp.clip((logs - low[:, None]) / step[:, None], 0, self.bins - 1)
        histogram = jax.vmap(lambda b, w: jnp.bincount(b, w, length=self.bins))(
            bins.astype(jnp.int32), counted.astype(jnp.int32)
        )
        fullest = jnp.argmax(histogram, axis=-1).astype(step.dtype)
        log_peak = (low + fullest * step) * math.log(10)
        lower, upper = log_peak + math.log(0.95), log_peak + math.log(1.5)
        if self.published_window:
            above = jnp.exp(log_eigenvalues) >= (lower / math.log(10))[:, None]
        else:
            above = log_eigenvalues >= lower[:, None]
        window = counted & above & (log_eigenvalues <= upper[:, None])
        return _min_ks(log_eigenvalues, valid, window)


class _Cells(NamedTuple):
    """A density of ln λ: intervals with their masses, and a mass at -inf.

    An interval of no length is a single value.
    """

    lower: Float[Array, "layers cells"]
    upper: Float[Array, "layers cells"]
    mass: Float[Array, "layers cells"]
    at_zero: Float[Array, " layers"]

    @classmethod
    def of(cls, log_nodes, weights) -> "_Cells":
        """Spread half of each node's weight to either side, as far as the next node."""
        exists = log_nodes > -jnp.inf
        x = jnp.where(exists, log_nodes, 0)
        before = jnp.concatenate([x[..., :1], x[..., :-1]], axis=-1)
        first = jnp.concatenate([exists[..., :1], ~exists[..., :-1]], axis=-1)
        before = jnp.where(first, x, before)
        after = jnp.concatenate([x[..., 1:], x[..., -1:]], axis=-1)
        half = jnp.where(exists, weights, 0) / 2

        def flat(*parts):
            return jnp.concatenate(parts, axis=-1).reshape(len(x), -1)

        at_zero = jnp.sum(jnp.where(exists, 0, weights), axis=(1, 2))
        return cls(flat(before, x), flat(x, after), flat(half, half), at_zero)

    def quantiles(
        self, probabilities: Float[Array, "k layers"]
    ) -> Float[Array, "k layers"]:
        """Return the ln λ with so much below them, by bisection; -inf among zeros."""
        lower, upper, mass, at_zero = (column[None] for column in self)
        low = jnp.min(lower, axis=-1, initial=jnp.inf, where=mass > 0)
        high = jnp.max(upper, axis=-1, initial=-jnp.inf, where=mass > 0)
        known = (high > -jnp.inf) & (probabilities > at_zero)
        low, high = jnp.where(known, low, 0), jnp.where(known, high, 0)
        length = jnp.where(upper > lower, upper - lower, 1)

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            inside = jnp.clip((middle[..., None] - lower) / length, 0, 1)
            inside = jnp.where(upper <= middle[..., None], 1, inside)
            enough = at_zero + jnp.sum(mass * inside, axis=-1) >= probabilities
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        steps = jnp.finfo(mass.dtype).nmant + 8
        _, high = jax.lax.fori_loop(0, steps, halve, (low, high))
        return jnp.where(known, high, -jnp.inf)

    def excess(self, threshold):
        """Return ∫ (ln λ - threshold) over what lies above the threshold."""
        threshold = jnp.where(threshold > -jnp.inf, threshold, 0)[:, None]
        above = jnp.maximum(self.upper - threshold, 0)
        below = jnp.maximum(threshold - self.lower, 0)
        # A cell that straddles the threshold has above / (above + below) over it.
        share = above / jnp.where(below > 0, above + below, 1)
        share = jnp.where(below > 0, share, 1)
        start = jnp.maximum(self.lower - threshold, 0)
        return jnp.sum(self.mass * share * (above + start) / 2, axis=-1)


def _ks_terms(excess, alpha, rank, size):
    """Return |1 - (λ/xmin)^(1-alpha) - m/n|: ln(λ/xmin) = excess, m = rank, n = size.

    Where excess is 0 the power is 1 for every alpha, an infinite one included.
    """
    above = jnp.where(excess > 0, excess, 1)
    exponent = jnp.where(excess > 0, (1 - alpha) * above, 0)
    share = (rank / size).astype(exponent.dtype)
    return jnp.abs(1 - jnp.exp(exponent) - share)


def _min_ks(log_eigenvalues: Logs, valid: Mask, window: Mask) -> PowerLaw:
    """Take the candidate xmin of the window with the smallest KS distance.

    Distances are computed for `_CANDIDATES_AT_ONCE` candidates at a time, so that
    memory grows with N and not with N².
    """
    width = log_eigenvalues.shape[-1]
    columns = jnp.arange(width)

    def fit_row(row):
        logs, in_spectrum, in_window = row
        known = in_spectrum & (logs > -jnp.inf)
        top = jnp.max(logs, initial=-jnp.inf, where=known)
        # Sums relative to the largest: the small differences at the top stay exact.
        relative = jnp.where(known, logs - jnp.where(known.any(), top, 0), 0)
        totals = jnp.cumsum(relative[::-1])[::-1]
        size = width - columns
        number = size.astype(totals.dtype)
        excess_total = totals - number * relative
        usable = in_window & known & (columns < width - 1)
        positive = usable & (excess_total > 0)
        alpha = 1 + number / jnp.where(positive, excess_total, 1)
        alpha = jnp.where(usable & ~positive, jnp.inf, alpha)

        def distances_of(candidates):
            # None of their tails starts further to the left.
            start = int(candidates[0])

            def distance(candidate):
                rank = columns[start:] - candidate
                tail = rank >= 0
                excess = jnp.where(tail, relative[start:] - relative[candidate], 0)
                terms = _ks_terms(excess, alpha[candidate], rank, size[candidate])
                return jnp.max(terms, initial=0, where=tail)

            together = min(_CANDIDATES_AT_ONCE, len(candidates))
            return jax.lax.map(distance, candidates, batch_size=together)

        parts = np.array_split(np.arange(width), min(_PARTS, width))
        distances = jnp.concatenate([distances_of(part) for part in parts])
        distances = jnp.where(usable & (alpha > 1), distances, 1)
        best = jnp.argmin(distances)
        found = usable[best]
        return PowerLaw(
            alpha=jnp.where(found, alpha[best], 0),
            xmin=jnp.where(found, jnp.exp(logs[best]), 0),
            ks_distance=distances[best],
            tail_size=jnp.where(found, size[best], 0),
        )

    return jax.lax.map(fit_row, (log_eigenvalues, valid, window))
