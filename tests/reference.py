"""The published method in NumPy float64, written from its formulas.

An independent statement of what the library computes: spectra, the three fits,
which layers are kept, the four maps, who follows whom.  Nothing here is shared with
the library, and `test_golden_reference.py` holds it to the recorded numbers.

Kernels are PyTorch's: (out, in) and (out, in, height, width).  λ ascends.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """A power law p(λ) ∝ λ^-alpha for λ >= xmin; alpha 0 says that none was found."""

    alpha: float
    ks_distance: float
    xmin: float
    tail_size: int


class Candidates(NamedTuple):
    """Every tail that a fit compares: one entry per smallest eigenvalue.

    Attributes:
        alpha: exponents; 0 outside the fit's window.
        ks_distance: distances; 1 outside the window and where alpha <= 1.
    """

    alpha: np.ndarray
    ks_distance: np.ndarray


def spectrum(kernel: np.ndarray, conv_norm: float = 0.5) -> np.ndarray:
    """λ = σ² of the kernel's matrices, pooled over positions where it has some."""
    kernel = np.asarray(kernel, np.float64)
    matrices, factor = kernel, 1.0
    if kernel.ndim == 4:
        matrices, factor = np.transpose(kernel, (2, 3, 0, 1)), conv_norm
    singular_values = np.linalg.svd(matrices, compute_uv=False)
    return np.sort(factor * singular_values.ravel() ** 2)


def above_floor(eigenvalues: np.ndarray, floor: float | None) -> np.ndarray:
    """The eigenvalues above a floor; all of them if there is no such."""
    if floor is None:
        return eigenvalues
    kept = eigenvalues[eigenvalues > floor]
    return kept if kept.size else eigenvalues


def _alphas(logs: np.ndarray) -> np.ndarray:
    """The Hill estimate of the tail from each entry on, the threshold included."""
    size = np.arange(len(logs), 0, -1)
    sums = np.cumsum(logs[::-1])[::-1] - size * logs
    with np.errstate(divide="ignore"):
        return 1 + size / np.maximum(sums, 0)


def _distances(
    eigenvalues: np.ndarray, starts: np.ndarray, alphas: np.ndarray
) -> np.ndarray:
    """KS distances of the tails from these entries on, all compared at once."""
    first, count = starts[0], len(eigenvalues)
    rank = (np.arange(first, count) - starts[:, None]) / (count - starts[:, None])
    with np.errstate(all="ignore"):
        ratio = eigenvalues[first:] / eigenvalues[starts, None]
        terms = np.abs(1 - ratio ** (1 - alphas[:, None]) - rank)
    return np.where(rank < 0, 0, terms).max(axis=1)


def fit_median(eigenvalues: np.ndarray, position: float = 2) -> Fit:
    """Hill estimate of the tail from the entry floor(N / position) on."""
    tail = eigenvalues[math.floor(len(eigenvalues) / position) :]
    logs = np.log(tail)
    excess = np.sum(logs) - len(tail) * logs[0]
    alpha = 1 + len(tail) / excess if excess != 0 else math.inf
    first = np.asarray([len(eigenvalues) - len(tail)])
    (distance,) = _distances(eigenvalues, first, np.asarray([alpha]))
    return Fit(alpha, float(distance), float(tail[0]), len(tail))


def candidates(eigenvalues: np.ndarray, window: np.ndarray | None = None) -> Candidates:
    """The tails from every eigenvalue on but the largest, inside a window."""
    allowed = np.ones(len(eigenvalues), bool) if window is None else window
    with np.errstate(all="ignore"):
        alpha = np.where(allowed, _alphas(np.log(eigenvalues)), 0)[:-1]
    distance = np.ones(len(alpha))
    tails = np.flatnonzero(alpha > 1)
    for starts in np.split(tails, range(64, len(tails), 64)):
        if len(starts):
            distance[starts] = _distances(eigenvalues, starts, alpha[starts])
    return Candidates(alpha, distance)


def best_of(eigenvalues: np.ndarray, tried: Candidates) -> Fit:
    """The first of the candidates with the smallest distance."""
    if not tried.alpha.size:
        return Fit(0, 1, 0, 0)
    best = int(np.argmin(tried.ks_distance))
    return Fit(
        float(tried.alpha[best]),
        float(tried.ks_distance[best]),
        float(eigenvalues[best]),
        len(eigenvalues) - best,
    )


def fit_min_ks(eigenvalues: np.ndarray) -> Fit:
    """The tail with the smallest Kolmogorov-Smirnov distance ("goodness-of-fit")."""
    return best_of(eigenvalues, candidates(eigenvalues))


def peak_window(
    eigenvalues: np.ndarray, bins: int = 100, *, published: bool = True
) -> np.ndarray:
    """Which eigenvalues the peak fit tries: those near the fullest bin of log10 λ."""
    logs = np.log10(eigenvalues)
    low, high = logs[0], logs[-1]
    if low == high:  # The histogram then spans one decade on either side.
        low, high = low - 1, high + 1
    place = np.floor((logs - low) / (high - low) * bins).astype(int)
    counts = np.bincount(np.minimum(place, bins - 1), minlength=bins)
    peak = 10 ** (low + np.argmax(counts) * (high - low) / bins)
    lower = math.log10(0.95 * peak) if published else 0.95 * peak
    return (eigenvalues >= lower) & (eigenvalues <= 1.5 * peak)


def fit_peak(eigenvalues: np.ndarray) -> Fit:
    """As `fit_min_ks`, with xmin in the published window ("fix-finger")."""
    return best_of(eigenvalues, candidates(eigenvalues, peak_window(eigenvalues)))


# By the published names, of eigenvalues and the position of the median fit.
FITS: dict[str, Callable[[np.ndarray, float], Fit]] = {
    "median": fit_median,
    "goodness-of-fit": lambda eigenvalues, _: fit_min_ks(eigenvalues),
    "fix-finger": lambda eigenvalues, _: fit_peak(eigenvalues),
}


def select(
    eigenvalue_counts: Sequence[int], *, first: bool, last: bool, threshold: int
) -> np.ndarray:
    """Layers left without the first, the last, and those with N < threshold."""
    kept = np.asarray(eigenvalue_counts) >= threshold
    kept[: int(first)] = False
    kept[len(kept) - int(last) :] = False
    return kept


def _linear(scores: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.interp(scores, [scores.min(), scores.max()], [low, high])


def _share(values: np.ndarray) -> np.ndarray:
    return len(values) * values / values.sum()


def _step(scores: np.ndarray, low: float, high: float) -> np.ndarray:
    rank = np.argsort(np.argsort(scores, kind="stable"))
    return low + (high - low) * rank / len(scores)


PUBLISHED_MAPS: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "tb_linear_map": _linear,
    "tb_sqrt": lambda scores, *_: _share(np.sqrt(scores)),
    "tb_log2": lambda scores, *_: _share(np.log2(scores)),
    "tb_step": _step,
}
# Smallest score that a map is defined for in the library.
DOMAIN = {"tb_linear_map": -math.inf, "tb_sqrt": 0, "tb_log2": 1, "tb_step": -math.inf}


def multipliers(scores: np.ndarray, kind: str, low: float, high: float) -> np.ndarray:
    """Multipliers as the library defines them.

    The published map over the finite scores inside its domain, and 1 for the other
    layers, for all of them if their scores are equal, and for a single one.
    """
    scores = np.asarray(scores, np.float64)
    result = np.ones(len(scores))
    inside = np.isfinite(scores) & (np.nan_to_num(scores) >= DOMAIN[kind])
    some = scores[inside]
    # Equal up to rounding; a single one, or none, is equal.
    spread = np.ptp(some) if some.size else 0
    if spread > 8 * np.finfo(np.float64).eps * np.abs(some).max(initial=0):
        result[inside] = PUBLISHED_MAPS[kind](some, low, high)
    return result


def norm_by_name(modules: Sequence[Sequence[str]]) -> dict[str, str]:
    """BatchNorm to the layer of the same name with every "bn" as "conv"."""
    layers = {name for name, kind in modules if kind.endswith(("Conv2d", "Linear"))}
    renamed = {
        name: name.replace("bn", "conv")
        for name, kind in modules
        if kind == "BatchNorm2d"
    }
    return {name: layer for name, layer in renamed.items() if layer in layers}


def norm_by_order(
    modules: Sequence[Sequence[str]], norm: str, layer: str
) -> dict[str, str]:
    """Norm to the layer before it, if that has no norm of its own yet."""
    sequence = [(name, kind) for name, kind in modules if kind.endswith((norm, layer))]
    return {
        name: before
        for (before, kind_before), (name, kind) in itertools.pairwise(sequence)
        if kind == norm and kind_before != norm
    }


def followers(
    layer_names: Sequence[str],
    param_names: Sequence[str],
    norms: dict[str, str],
) -> dict[str, tuple[str, ...]]:
    """The parameters that share a layer's rate: its bias, and its norms' own."""
    names = set(param_names)
    result = {}
    for layer in layer_names:
        own = [f"{layer}.bias" if layer else "bias"]
        own += [
            f"{norm}.{leaf}"
            for norm, followed in norms.items()
            if followed == layer
            for leaf in ("weight", "bias")
        ]
        result[layer] = tuple(name for name in own if name in names)
    return result
