"""The order in which the slices of all kernels run."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tb_optax.forward.reading import kernel_products
from tb_optax.forward.record import LoopEnd, LoopStart, Product, Record
from tb_optax.forward.values import Loop
from tb_optax.layers import MatrixAxes

Slice = tuple[str, tuple[int, ...]]


def slices_in_order(record: Record, axes: Mapping[str, MatrixAxes]) -> list[Slice]:
    """Path and index of every kernel, in order of execution, each once.

    A loop runs one slice of each of its stacks after the other.  Stacks whose slices
    run side by side, or in an order that the program does not say, are one entry with
    an empty index.
    """
    products = [product for product in kernel_products(record) if product.path in axes]
    whole = {p.path for p in products if _whole(p, axes[p.path])}
    sliced = {pick for p in products for pick in p.picks.values()}
    numbers = {product.number for product in products}
    found: dict[Slice, None] = {}
    for product, iteration in _run(iter(record.events), {}, sliced):
        if product.number not in numbers:
            continue
        path = product.path
        if path in whole:
            found[path, ()] = None
            continue
        for index in _indices(product, axes[path], record.shapes[path], iteration):
            found[path, index] = None
    return list(found)


def _whole(product: Product, axes: MatrixAxes) -> bool:
    picks = [product.picks[axis] for axis in axes.stacked if axis in product.picks]
    return not picks or None in picks


def _run(
    events: Iterator[Any], iteration: dict[Loop, int], sliced: set[Any]
) -> Iterator[tuple[Product, dict[Loop, int]]]:
    """Products as they are executed, loops unrolled, with the iterations they are in.

    Loops that slice no kernel do the same in every iteration and run once.
    """
    for event in events:
        if isinstance(event, Product):
            yield event, iteration
        elif isinstance(event, LoopStart):
            loop = event.loop
            body = list(_body(events))
            turns = range(loop.length)
            if loop not in sliced:
                turns = turns[:1]
            for turn in reversed(turns) if loop.reverse else turns:
                yield from _run(iter(body), {**iteration, loop: turn}, sliced)


def _body(events: Iterator[Any]) -> Iterator[Any]:
    """Events up to the end of the loop that has just started."""
    depth = 1
    for event in events:
        depth += isinstance(event, LoopStart)
        depth -= isinstance(event, LoopEnd)
        if not depth:
            return
        yield event


def _indices(product, axes: MatrixAxes, shape, iteration) -> Iterator[tuple[int, ...]]:
    ranges: list[Sequence[int]] = []
    for axis in axes.stacked:
        pick = product.picks.get(axis)
        if isinstance(pick, Loop):
            pick = iteration[pick]
        ranges.append(range(shape[axis]) if pick is None else (pick,))
    return itertools.product(*ranges)
