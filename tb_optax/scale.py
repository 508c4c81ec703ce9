"""Exact rescaling of matrices by powers of two.

The work is done on the bits, because subnormal numbers count as zero in compiled
arithmetic: a kernel of 1e-40 has its spectrum like any other.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@jax.jit
def rescale(
    matrices: Float[Array, "batch rows columns"],
) -> tuple[Float[Array, "batch rows columns"], Int[Array, " batch"]]:
    """Divides each matrix by a power of two near its largest magnitude.

    Args:
        matrices: the matrices.

    Returns:
        The matrices with their largest magnitude in [1/2, 4), zero where they are
        zero or not finite; the bits of that magnitude, which `exponents` reads.

    >>> rescaled, top = rescale(jnp.full((1, 1, 2), 3e-20))
    >>> print(rescaled.round(4), *exponents(top))
    [[[0.5534 0.5534]]] [-64] [ True]
    """
    dtype = matrices.dtype
    info, integer = jnp.finfo(dtype), integer_like(dtype)
    bits = jax.lax.bitcast_convert_type(matrices, integer)
    magnitude = bits & np.iinfo(integer).max
    top = _largest(magnitude)
    biased, finite = _biased(top)
    # Small ones are multiplied by 2^lift before, a sum of exponents.
    low = biased < _lift(info)
    inverse = 2 * info.maxexp - 3 - biased - low.astype(jnp.int32) * _lift(info)
    factor = jax.lax.bitcast_convert_type(inverse.astype(integer) << info.nmant, dtype)
    subnormal = magnitude.astype(dtype) * 2.0 ** (
        info.minexp - info.nmant + _lift(info)
    )
    lifted = jax.lax.select(
        magnitude < integer(2**info.nmant),
        jax.lax.bitcast_convert_type(subnormal, integer),
        magnitude + integer(_lift(info) << info.nmant),
    )
    low, factor, finite = (
        jax.lax.broadcast_in_dim(column, matrices.shape, (0,))
        for column in (low, factor, finite)
    )
    signed = jax.lax.select(low, lifted, magnitude) | (bits ^ magnitude)
    rescaled = jax.lax.bitcast_convert_type(signed, dtype) * factor
    return jax.lax.select(finite, rescaled, jnp.zeros_like(rescaled)), top


def _largest(magnitude):
    """Of each matrix, over short axes: XLA compiles three kernels for longer ones."""
    axes = [factor for size in magnitude.shape[1:] for factor in _factors(size)]
    folded = jax.lax.optimization_barrier(magnitude.reshape(len(magnitude), *axes))
    return jnp.max(folded, axis=tuple(range(1, folded.ndim)))


def _factors(size: int) -> list[int]:
    """Up to 32, where there are such."""
    for factor in range(32, 1, -1):
        if size % factor == 0:
            return [*_factors(size // factor), factor]
    return [size] if size > 1 else []


def exponents(
    top: Int[Array, " batch"],
) -> tuple[Int[Array, " batch"], Bool[Array, " batch"]]:
    """The exponents of the powers that `rescale` divided by, and what was finite."""
    biased, finite = _biased(top)
    exponent = biased + jnp.finfo(_floating(top.dtype)).minexp
    return jnp.where(finite, exponent, 0), finite


def _biased(top):
    """The biased exponent of a magnitude, below 1 if it is subnormal; is it finite?"""
    info = jnp.finfo(_floating(top.dtype))
    exponent = (top >> info.nmant).astype(jnp.int32)
    digits = info.bits - jax.lax.clz(top).astype(jnp.int32)
    biased = jnp.where(exponent == 0, digits - info.nmant, exponent)
    # The power of two is a normal number.
    return jnp.minimum(biased, 2 * info.maxexp - 4), exponent < 2 * info.maxexp - 1


def _lift(info) -> int:
    """Lifted by this power of two, every subnormal number is a normal one."""
    return 2 * info.nmant


def integer_like(dtype):
    """The signed integers of as many bits as these floats."""
    return np.int32 if jnp.finfo(dtype).bits == 32 else np.int64


def _floating(integer):
    return np.float32 if integer == np.int32 else np.float64
