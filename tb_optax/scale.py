"""Exact rescaling of matrices by powers of two.

The work is done on the bits, because subnormal numbers count as zero in compiled
arithmetic: a kernel of 1e-40 has its spectrum like any other.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt


@jax.jit
def rescale(
    matrices: Float[Array, "batch rows columns"],
) -> tuple[Float[Array, "batch rows columns"], UInt[Array, " batch"]]:
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
    bits = jax.lax.bitcast_convert_type(matrices, _unsigned(dtype))
    magnitude = bits & _unsigned(dtype)(2 ** (jnp.finfo(dtype).bits - 1) - 1)
    top = jnp.max(magnitude, axis=(1, 2))
    finite, low, biased = (x[:, None, None] for x in _parts(top))
    info = jnp.finfo(dtype)
    factor = jax.lax.bitcast_convert_type(
        (_unsigned(dtype)(2 * info.maxexp - 3) - biased) << info.nmant, dtype
    )
    lifted = _lifted(magnitude)
    signed = jnp.where(jnp.signbit(matrices), -lifted, lifted)
    rescaled = jnp.where(low, signed, matrices) * factor
    return jnp.where(finite, rescaled, 0), top


def exponents(
    top: UInt[Array, " batch"],
) -> tuple[Int[Array, " batch"], Bool[Array, " batch"]]:
    """The exponents of the powers that `rescale` divided by, and what was finite."""
    finite, low, biased = _parts(top)
    info = jnp.finfo(_floating(top.dtype))
    exponent = biased.astype(jnp.int32) + info.minexp
    exponent = exponent - jnp.where(low, _lift(info), 0)
    exponent = jnp.where(top == 0, info.minexp - _lift(info), exponent)
    return jnp.where(finite, exponent, 0), finite


def _parts(top):
    """Whether a magnitude is finite, is to be lifted, and its biased exponent then."""
    dtype = _floating(top.dtype)
    info = jnp.finfo(dtype)
    unsigned = _unsigned(dtype)
    finite = top < unsigned((2 * info.maxexp - 1) << info.nmant)
    low = top < unsigned(_lift(info) << info.nmant)
    lifted = jax.lax.bitcast_convert_type(_lifted(top), unsigned)
    biased = jnp.where(low, lifted, top) >> unsigned(info.nmant)
    # The power of two is a normal number.
    return finite, low, jnp.minimum(biased, unsigned(2 * info.maxexp - 4))


def _lifted(magnitude):
    """Floats of these bits times 2^lift, subnormal ones among them."""
    dtype = _floating(magnitude.dtype)
    info = jnp.finfo(dtype)
    value = jax.lax.bitcast_convert_type(magnitude, dtype) * 2.0 ** _lift(info)
    mantissa = magnitude.astype(dtype) * 2.0 ** (info.minexp - info.nmant + _lift(info))
    return jnp.where(magnitude >> info.nmant == 0, mantissa, value)


def _lift(info) -> int:
    """Lifted by this power of two, every subnormal number is a normal one."""
    return 2 * info.nmant


def _unsigned(dtype):
    return np.uint32 if jnp.finfo(dtype).bits == 32 else np.uint64


def _floating(unsigned):
    return np.float32 if unsigned == np.uint32 else np.float64
