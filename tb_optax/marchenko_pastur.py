"""The exponent of a random matrix, which depends on its shape alone."""

import functools

import numpy as np

from tb_optax.power_law import fit_median


@functools.lru_cache(maxsize=4096)
def random_alpha(n: int, m: int, count: int, fit: fit_median) -> float:
    r"""Return what `fit_median` finds in matrices with independent random entries.

    The eigenvalues λ of WWᵀ / m, n x m with n <= m and entries of variance 1, have as n
    grows the Marchenko-Pastur density, with q = n / m and λ = 1 + q + 2·sqrt(q)·cos θ,

        p(λ) dλ = (2/π)·sin²θ / λ dθ    over 0 <= θ <= π.

    Of its quantiles x(p), i = floor(N / position), and xmin that of (i + 1/2) / N, or
    of (i - 1/2) / N without the threshold,

        alpha = 1 + (1 - i/N) / ∫ (ln x(p) - ln xmin) dp    over p from i/N to 1.

    N is the number of eigenvalues that are pooled. It is 0 where the fit finds none.

    >>> round(random_alpha(1000, 1000, 1000, fit_median()), 2)
    2.12

    References:
        Marchenko and Pastur, `Distribution of Eigenvalues for Some Sets of Random
        Matrices <https://doi.org/10.1070/SM1967v001n04ABEH001994>`_, 1967
    """
    q, points = n / m, 2**14
    first = np.floor(count / fit.position)
    rank = first + (0.5 if fit.include_threshold else -0.5)
    if rank < 0 or count < 2:
        return 0.0
    # From the largest λ on, in the middles of equal steps.
    angle = (np.arange(points) + 0.5) * np.pi / points
    eigenvalues = 1 + q + 2 * np.sqrt(q) * np.cos(angle)
    mass = 2 * np.sin(angle) ** 2 / eigenvalues / points
    above = np.cumsum(mass) / mass.sum()
    middles = above - mass / mass.sum() / 2
    logs = np.log(eigenvalues)
    tail = 1 - first / count
    threshold = np.interp(1 - rank / count, middles, logs)
    part = np.clip(tail - (above - mass / mass.sum()), 0, mass / mass.sum())
    excess = np.sum(part * (logs - threshold))
    return float(1 + tail / excess) if excess > 0 else 0.0
