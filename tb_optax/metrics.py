"""Columns of the table from spectra and fits, and which fits can be trusted."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool

from tb_optax.layers import Layer
from tb_optax.power_law import PowerLaw
from tb_optax.spectrum import Spectra
from tb_optax.table import Analysis

# An exponent above this says that all eigenvalues are equal but for rounding.
MAX_ALPHA = 1e4


def metrics_table(
    layers: tuple[Layer, ...], spectra: Spectra, law: PowerLaw, *, absolute: bool
) -> Analysis:
    """The table of an analysis, before any multiplier is assigned.

    Args:
        layers: the layers, one per row.
        spectra: their spectra, each in the unit of its own kernel.
        law: the fits.
        absolute: whether the fits were given eigenvalues in absolute units.

    Returns:
        Analysis with multipliers 1 and nothing tuned; what is not fitted has alpha 0
        and no tail.
    """
    logs, exponent = spectra.log_eigenvalues, spectra.exponent
    dtype = logs.dtype
    fitted = _is_fitted(law, spectra, absolute)
    log_top = logs[:, -1]
    is_zero = log_top == -jnp.inf
    log_top = jnp.where(is_zero, 0, log_top)
    counted = spectra.is_eigenvalue() & ~is_zero[:, None]
    relative = jnp.where(counted, jnp.exp(logs - log_top[:, None]), 0)
    stable_rank = relative.sum(axis=-1)
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


def _is_fitted(
    law: PowerLaw, spectra: Spectra, absolute: bool
) -> Bool[Array, " layers"]:
    """Whether each fit can be trusted; False for whatever is NaN."""
    logs = spectra.log_eigenvalues
    width = logs.shape[-1]
    # An absolute xmin can leave the range of the dtype: then its tail tells.
    first = jnp.clip(width - law.tail_size, 0, width - 1)[:, None]
    log_first = jnp.take_along_axis(logs, first, axis=-1)[:, 0]
    in_range = (law.xmin > 0) & (law.xmin < jnp.inf)
    log_xmin = jnp.log(jnp.where(in_range, law.xmin, 1))
    log_xmin = log_xmin - (spectra.log_unit() if absolute else 0)
    log_xmin = jnp.where(in_range, log_xmin, log_first)
    log_top = logs[:, -1]
    return (
        spectra.finite
        & (log_top > -jnp.inf)
        & (law.alpha > 0)
        & (law.alpha <= MAX_ALPHA)
        & (log_xmin > log_top + spectra.log_noise)
    )
