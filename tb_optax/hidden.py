"""Numbers that XLA does not see, so that it compiles once what differs in them only.

Compile time goes by the number of different kernels. Steps of a loop body that are
written one after the other, each with a place of its own, are different ones wherever
the places are constants of the program.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def hidden(numbers: Iterable[int]) -> list[Int[Array, ""]]:
    """The same numbers, behind a barrier.

    >>> print(*hidden(range(3)))
    0 1 2
    """
    return jax.lax.optimization_barrier([jnp.asarray(number) for number in numbers])
