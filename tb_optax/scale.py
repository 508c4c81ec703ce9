"""Exact rescaling of matrices by powers of two.

The work is done on the bits, because subnormal numbers count as zero in compiled
arithmetic: a kernel of 1e-40 has its spectrum like any other.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def rescale(
    matrices: Float[Array, "batch rows columns"],
) -> tuple[
    Float[Array, "batch rows columns"], Int[Array, " batch"], Bool[Array, " batch"]
]:
    """Divides each matrix by a power of two near its largest magnitude.

    Args:
        matrices: the matrices.

    Returns:
        The matrices with their largest magnitude in [1/2, 4), zero where they are
        zero or not finite; the exponents of the powers; whether each is finite.

    >>> rescaled, exponent, _ = rescale(jnp.full((1, 1, 2), 3e-20))
    >>> print(rescaled.round(4), exponent)
    [[[0.5534 0.5534]]] [-64]
    """
    dtype = matrices.dtype
    info = jnp.finfo(dtype)
    unsigned = np.uint32 if info.bits == 32 else np.uint64
    bits = jax.lax.bitcast_convert_type(matrices, unsigned)
    bits = bits & unsigned(2 ** (info.bits - 1) - 1)
    top = jnp.max(bits, axis=(1, 2))
    finite = top < unsigned((2 * info.maxexp - 1) << info.nmant)
    # Lifted by this power of two, every subnormal number is a normal one.
    lift = 2 * info.nmant
    low = top < unsigned(lift << info.nmant)

    def lifted(bits):
        subnormal = bits < unsigned(1 << info.nmant)
        value = jax.lax.bitcast_convert_type(bits, dtype) * 2.0**lift
        mantissa = bits.astype(dtype) * 2.0 ** (info.minexp - info.nmant + lift)
        return jnp.where(subnormal, mantissa, value)

    largest = jax.lax.bitcast_convert_type(jnp.where(finite, top, 0), dtype)
    _, exponent = jnp.frexp(jnp.where(low, lifted(top), largest))
    exponent = jnp.clip(exponent, info.minexp + 2, info.maxexp - 2)
    factor = jnp.ldexp(jnp.ones_like(largest), -exponent)
    exponent = exponent - jnp.where(low, lift, 0)
    exponent = jnp.where(top == 0, info.minexp - lift, exponent)

    magnitude = lifted(bits)
    signed = jnp.where(jnp.signbit(matrices), -magnitude, magnitude)
    each = (slice(None), None, None)
    rescaled = jnp.where(low[each], signed, matrices) * factor[each]
    return jnp.where(finite[each], rescaled, 0), exponent, finite
