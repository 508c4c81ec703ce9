"""From the record of a forward pass to the axes of each kernel."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tb_optax.forward.kernels import OUTPUT, REDUCTION, STACKED
from tb_optax.forward.record import (
    Auxiliary,
    Batched,
    Product,
    Record,
    Unclear,
)
from tb_optax.layers import MatrixAxes


class Kernels(NamedTuple):
    """What a forward pass says of its parameters.

    Attributes:
        axes: of every kernel, by path.
        unclear: why the axes of a parameter cannot be told, by path.
    """

    axes: dict[str, MatrixAxes]
    unclear: dict[str, str]


def read_kernels(record: Record) -> Kernels:
    """Axes of all kernels, and what remains unclear."""
    products = kernel_products(record)
    batched = {e for e in record.events if isinstance(e, Batched)}
    unclear: dict[str, str] = {}
    for event in record.events:
        if isinstance(event, Unclear):
            unclear.setdefault(event.path, event.reason)
    axes: dict[str, MatrixAxes] = {}
    for product in products:
        path, shape = product.path, record.shapes[product.path]
        if path in record.given:
            given = record.given[path]
            if given is not None:
                axes[path] = given
            continue
        reading = _read(product, shape, batched)
        if isinstance(reading, str):
            unclear.setdefault(path, reading)
        elif reading is not None and axes.setdefault(path, reading) != reading:
            unclear.setdefault(path, f"it is used with {axes[path]} and with {reading}")
    for path, shape in record.shapes.items():
        wide = sum(size > 1 for size in shape) > 1
        if wide and path not in record.seen and path not in record.given:
            unclear.setdefault(path, "the forward pass does not use it")
    return Kernels(
        {path: found for path, found in axes.items() if path not in unclear}, unclear
    )


def kernel_products(record: Record) -> list[Product]:
    """The products that make layers."""
    auxiliary = {e.number for e in record.events if isinstance(e, Auxiliary)}
    return [
        event
        for event in record.events
        if isinstance(event, Product) and event.kernel and event.number not in auxiliary
    ]


def _read(
    product: Product, shape: Sequence[int], batched: set[Batched]
) -> MatrixAxes | str | None:
    """Axes of a kernel in one product, why they are unclear, None for vectors."""
    fields: dict[str, list[int]] = {}
    spare = []
    for axis, size in enumerate(shape):
        roles = set(product.roles.get(axis, ()))
        if axis in product.picks:
            roles.add(STACKED)
        if roles == {OUTPUT} and Batched(product.number, axis) in batched:
            roles = {STACKED}
        if len(roles) > 1:
            return f"its axis {axis} is partly {' and partly '.join(sorted(roles))}"
        if roles:
            fields.setdefault(roles.pop(), []).append(axis)
        elif size == 1:
            spare.append(axis)
        else:
            return f"what becomes of its axis {axis} cannot be followed"
    for role, other in ((REDUCTION, OUTPUT), (OUTPUT, REDUCTION)):
        if role not in fields and not spare:
            spare = _lent(fields.get(other, []), shape)
        if role not in fields and spare:
            fields[role] = [spare.pop()]
    if OUTPUT not in fields or len(shape) < 2:
        return None
    if REDUCTION not in fields:
        return "none of its axes is summed over"
    fields[REDUCTION] = sorted(fields[REDUCTION] + spare)
    if not _contiguous(fields, shape):
        return (
            f"its output axes {tuple(fields[OUTPUT])} are apart: outputs of one layer, "
            f"or a stack of layers along one of them?"
        )
    return MatrixAxes(**{role: tuple(axes) for role, axes in fields.items()})


def _lent(axes: list[int], shape: Sequence[int]) -> list[int]:
    """An axis of size 1 that may be in another field, taken out of this one."""
    single = [axis for axis in axes if shape[axis] == 1]
    if len(axes) < 2 or not single:
        return []
    axes.remove(single[-1])
    return single[-1:]


def _contiguous(fields: Mapping[str, list[int]], shape: Sequence[int]) -> bool:
    """Whether nothing but stacked axes lies between the output axes."""
    stacked = fields.get(STACKED, [])
    rest = [a for a, size in enumerate(shape) if size > 1 and a not in stacked]
    places = [place for place, axis in enumerate(rest) if axis in fields[OUTPUT]]
    return not places or places[-1] - places[0] == len(places) - 1
