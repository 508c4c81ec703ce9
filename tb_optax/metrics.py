"""Columns of the table from spectra and fits, and which fits can be trusted."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tb_optax.lanczos import WeightedSpectra
from tb_optax.layers import Layer
from tb_optax.power_law import PowerLaw
from tb_optax.spectrum import Spectra
from tb_optax.table import Analysis

# An exponent above this says that all eigenvalues are equal but for rounding.
MAX_ALPHA = 1e4


def metrics_table(
    layers: tuple[Layer, ...],
    spectra: Spectra | WeightedSpectra,
    law: PowerLaw,
    *,
    absolute: bool,
) -> Analysis:
    """The table of an analysis, before any multiplier is assigned.

    Args:
        layers: the layers, one per row.
        spectra: their spectra or estimates of them, each in the unit of its own kernel.
        law: the fits.
        absolute: whether the fits were given eigenvalues in absolute units.

    Returns:
        Analysis with multipliers 1 and nothing tuned; what is not fitted has alpha 0
        and no tail.
    """
    exponent, dtype = spectra.exponent, law.alpha.dtype
    if isinstance(spectra, Spectra):
        log_top, stable_rank = spectra.log_eigenvalues[:, -1], _stable_rank(spectra)
        log_first = _log_first(law, spectra)
    else:
        log_top, stable_rank = spectra.log_top, spectra.stable_rank()
        log_first = jnp.full_like(log_top, -jnp.inf)
    fitted = _is_fitted(law, spectra, log_top, log_first, absolute)
    is_zero = log_top == -jnp.inf
    log_top = jnp.where(is_zero, 0, log_top)
    sigma = jnp.where(is_zero, 0, jnp.exp(log_top / 2)) * jnp.sqrt(spectra.factor)
    alpha = jnp.where(fitted, law.alpha, 0).astype(dtype)
    xmin = law.xmin if absolute else spectra.absolute(law.xmin)
    return Analysis(
        layers=layers,
        alpha=alpha,
        alpha_hat=alpha * (log_top + spectra.log_unit()) / math.log(10),
        ks_distance=jnp.where(fitted, law.ks_distance, 0).astype(dtype),
        xmin=jnp.where(fitted, xmin, 0).astype(dtype),
        tail_size=jnp.where(fitted, law.tail_size, 0).astype(jnp.int32),
        eigenvalue_count=jnp.asarray(spectra.count),
        spectral_norm=jnp.ldexp(sigma, exponent),
        frobenius_norm=jnp.ldexp(sigma * jnp.sqrt(stable_rank), exponent),
        stable_rank=stable_rank,
        multipliers=jnp.ones_like(alpha),
        fitted=fitted,
        tuned=jnp.zeros_like(fitted),
    )


def _stable_rank(spectra: Spectra) -> Float[Array, " layers"]:
    """Σλ / λ_max; 0 where there is no spectrum."""
    logs = spectra.log_eigenvalues
    is_zero = logs[:, -1:] == -jnp.inf
    counted = spectra.is_eigenvalue() & ~is_zero
    relative = logs - jnp.where(is_zero, 0, logs[:, -1:])
    return jnp.where(counted, jnp.exp(relative), 0).sum(axis=-1)


def _log_first(law: PowerLaw, spectra: Spectra) -> Float[Array, " layers"]:
    """The smallest eigenvalue of each tail."""
    logs = spectra.log_eigenvalues
    width = logs.shape[-1]
    first = jnp.clip(width - law.tail_size, 0, width - 1)[:, None]
    return jnp.take_along_axis(logs, first, axis=-1)[:, 0]


def _is_fitted(
    law: PowerLaw,
    spectra: Spectra | WeightedSpectra,
    log_top: Float[Array, " layers"],
    log_first: Float[Array, " layers"],
    absolute: bool,
) -> Bool[Array, " layers"]:
    """Whether each fit can be trusted; False for whatever is NaN."""
    # An absolute xmin can leave the range of the dtype: then its tail tells.
    in_range = (law.xmin > 0) & (law.xmin < jnp.inf)
    log_xmin = jnp.log(jnp.where(in_range, law.xmin, 1))
    log_xmin = log_xmin - (spectra.log_unit() if absolute else 0)
    log_xmin = jnp.where(in_range, log_xmin, log_first)
    return (
        spectra.finite
        & (log_top > -jnp.inf)
        & (law.alpha > 0)
        & (law.alpha <= MAX_ALPHA)
        & (log_xmin > log_top + spectra.log_noise)
    )
