"""How a product with data reads a kernel: the roles of its axes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tb_optax.forward.dimensions import Factor, origins_of, size_of
from tb_optax.forward.record import Auxiliary, Feed, Follower, Product, Record
from tb_optax.forward.values import Data, Parameter, View

REDUCTION, OUTPUT, POOLED, STACKED = "reduction", "output", "pooled", "stacked"


class Roles(NamedTuple):
    """What a product does with the dimensions of its kernel.

    Attributes:
        of: role of each dimension.
        groups: number of groups that the outputs are divided into, first.
    """

    of: Mapping[int, str]
    groups: int = 1


def apply_kernel(
    kernel: Parameter, roles: Roles, data: Data, record: Record
) -> tuple[int, ...]:
    """Writes down a product of data with a parameter; returns its numbers."""
    inputs = data.trail.last
    if not kernel.views:
        numbers = hidden_kernels(
            kernel.leaves,
            inputs,
            "it is computed with before it enters a product: its axes are lost",
            record,
        )
    else:
        numbers = tuple(_seen(view, roles, inputs, record) for view in kernel.views)
        paths = {view.path for view in kernel.views}
        for number in numbers:
            for path in sorted(kernel.leaves - paths):
                record.add(Follower(path, number, norm=False))
        for number in sorted(record.ancestors(kernel.products)):
            if record.path(number) in paths:
                record.add(Auxiliary(number))
    for path in sorted(data.trail.pending):
        record.add(Feed(path, numbers[0]))
    return numbers


def hidden_kernels(
    leaves: Iterable[str], inputs: tuple[int, ...], reason: str, record: Record
) -> tuple[int, ...]:
    """Writes down a product in which the axes of its parameters are out of sight."""
    numbers = []
    for path in sorted(leaves):
        numbers.append(record.number())
        shape = record.shapes[path]
        record.add(
            Product(
                number=numbers[-1],
                path=path,
                roles={},
                picks={},
                outputs=0,
                inputs=inputs,
                kernel=record.given.get(path) is not None,
            )
        )
        if sum(size > 1 for size in shape) > 1:
            record.unclear([path], reason)
    return tuple(numbers)


def _seen(view: View, roles: Roles, inputs: tuple[int, ...], record: Record) -> int:
    number = record.number()
    outputs = [dim for dim, role in roles.of.items() if role == OUTPUT]
    record.add(
        Product(
            number=number,
            path=view.path,
            roles=_axes(view, roles),
            picks=dict(view.picks),
            outputs=math.prod(size_of(view.dims[dim]) for dim in outputs),
            inputs=inputs,
        )
    )
    return number


def _axes(view: View, roles: Roles) -> dict[int, frozenset[str]]:
    """Roles of the axes of a parameter, from those of its dimensions in a product."""
    found: dict[int, set[str]] = {}

    def take(factors, role):
        for _, axis in origins_of(factors):
            found.setdefault(axis, set()).add(role)

    inputs = [dim for dim, role in roles.of.items() if role == REDUCTION]
    several = any(size_of(view.dims[dim]) > 1 for dim in inputs)
    for position, role in roles.of.items():
        dim = view.dims[position]
        if role == OUTPUT and roles.groups > 1 and several:
            groups = leading(dim, roles.groups)
            rest = dim[len(groups) :]
            if not origins_of(groups) & origins_of(rest):
                take(groups, STACKED)
                dim = rest
        take(dim, role)
    return {axis: frozenset(names) for axis, names in found.items()}


def leading(dimension: Sequence[Factor], size: int) -> tuple[Factor, ...]:
    """The first factors of a dimension, of this size together and not all of it."""
    for count in range(1, len(dimension)):
        if size_of(dimension[:count]) == size and size_of(dimension[count:]) > 1:
            return tuple(dimension[:count])
    return ()
