"""From the record of a forward pass to layers, and to a verdict on every leaf."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tb_optax.assignment import layer_of_leaf
from tb_optax.layers import Layer, MatrixAxes
from tb_optax.trace.record import (
    LEARNED,
    OUTPUT,
    REDUCTION,
    STACKED,
    Apart,
    Auxiliary,
    Failed,
    Feed,
    Follower,
    Note,
    Pair,
    Product,
    Record,
    Resampled,
)

NORMS = ("after", "before", "none")

Parts = int | Sequence[int]


class Unclear(NamedTuple):
    """A leaf that cannot be read.

    Attributes:
        reasons: what was tried, and why it failed.
        likely: the axes to propose; None for what is likely no kernel.
    """

    reasons: tuple[str, ...]
    likely: MatrixAxes | None


class Roles(NamedTuple):
    """What a forward pass says of its parameters.

    Attributes:
        layers: in order of execution.
        notes: the verdict on every leaf.
        unclear: leaves without one, in order of execution.
        likely: those among them that may be kernels of products without data.
        assumed: leaves that were assumed to be.
        learned: what stands in the place of data for them.
    """

    layers: tuple[Layer, ...]
    notes: Mapping[str, str]
    unclear: Mapping[str, Unclear]
    likely: frozenset[str]
    assumed: frozenset[str]
    learned: frozenset[str]


def roles_of(
    record: Record, norms: str, split: Mapping[str, tuple[int, Parts]]
) -> Roles:
    """Read a record."""
    auxiliary = {event.number for event in record.of_type(Auxiliary)}
    products = [
        event
        for event in record.of_type(Product)
        if event.kernel and event.number not in auxiliary
    ]
    axes, failures = _axes_of(record, products)
    products = [product for product in products if product.path in axes]
    targets, why_none = _targets(record, products, norms)
    layers = []
    for path, index in _in_order(products, axes, record.shapes):
        own = [Layer(path, axes[path], index=index)]
        if path in split:
            own = _parts(own[0], record.shapes[path], *split[path])
        layers += own
    layers = _with_followers(layers, targets, why_none, record)
    notes, unclear = _verdicts(record, layers, axes, failures, why_none)
    pairs = [pair for pair in record.of_type(Pair) if pair.path in unclear]
    assumed = frozenset(p.path for p in products if p.assumed)
    return Roles(
        layers=tuple(layers),
        notes=notes,
        unclear=unclear,
        likely=frozenset(pair.path for pair in pairs),
        assumed=assumed,
        learned=frozenset(n.path for n in record.of_type(Note) if n.reason == LEARNED),
    )


# ---- Axes ---------------------------------------------------------------------------


class _Reading(NamedTuple):
    """One product's reading of its kernel.

    Attributes:
        axes: before it is asked whether outputs are apart.
        final: afterwards.
        doubt: why that is unclear.
    """

    axes: MatrixAxes
    final: MatrixAxes
    doubt: str = ""


def _axes_of(
    record: Record, products: Sequence[Product]
) -> tuple[dict[str, MatrixAxes], dict[str, Unclear]]:
    """Axes of every kernel, and what is unclear though it multiplies data."""
    apart: dict[int, list[Apart]] = {}
    for event in record.of_type(Apart):
        apart.setdefault(event.number, []).append(event)
    tables = {event.number for event in record.of_type(Resampled)}
    readings: dict[str, list[_Reading]] = {}
    failures: dict[str, list[str]] = {}
    axes: dict[str, MatrixAxes] = {}
    for product in products:
        path, shape = product.path, record.shapes[product.path]
        if path in record.given:
            if record.given[path] is not None:
                axes[path] = record.given[path]
            continue
        reading = _read(product, shape, apart.get(product.number, ()))
        if isinstance(reading, _Reading) and not (
            product.number in tables and not product.data
        ):
            readings.setdefault(path, []).append(reading)
        elif isinstance(reading, str):
            failures.setdefault(path, []).append(reading)
        elif reading is not None:
            failures.setdefault(path, []).append(
                "constants multiply it along several axes: a kernel, or a table that "
                "is resampled?"
            )
    unclear = {}
    for path, own in readings.items():
        first, *others = own
        clash = next((other for other in others if not _agree(first, other)), None)
        if clash is not None:
            reason = f"it is used with {first.final} and with {clash.final}"
            unclear[path] = Unclear((reason,), first.final)
            continue
        clear = next((reading for reading in own if not reading.doubt), first)
        if clear.doubt:
            unclear[path] = Unclear((clear.doubt,), clear.final)
        else:
            axes[path] = clear.final
    for path, reasons in failures.items():
        if path not in axes and path not in unclear:
            unclear[path] = Unclear(tuple(dict.fromkeys(reasons)), None)
    return axes, unclear


def _agree(one: _Reading, other: _Reading) -> bool:
    """Whether two uses have the same spectrum: they are equal, or transposed."""
    mine = {one.axes, one.final}
    mine |= {_transposed(axes) for axes in mine}
    return bool(mine & {other.axes, other.final})


def _transposed(axes: MatrixAxes) -> MatrixAxes:
    return dataclasses.replace(axes, reduction=axes.output, output=axes.reduction)


def _read(
    product: Product, shape: Sequence[int], apart: Sequence[Apart]
) -> _Reading | str | None:
    """Axes of a kernel in one product, why they are unclear, None for vectors."""
    if product.roles is None:
        return None
    fields: dict[str, list[int]] = {}
    spare = []
    for axis, size in enumerate(shape):
        roles = set(product.roles.get(axis, ()))
        if axis in product.picks:
            roles.add(STACKED)
        if len(roles) > 1:
            return f"its axis {axis} is partly {' and partly '.join(sorted(roles))}"
        if roles:
            fields.setdefault(roles.pop(), []).append(axis)
        else:
            spare.append(axis)
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
    return _with_stacks(fields, shape, apart)


def _with_stacks(
    fields: dict[str, list[int]], shape: Sequence[int], apart: Sequence[Apart]
) -> _Reading:
    """Moves output axes that are apart to the stacked ones, where that is evident.

    A stack has its slices along the same axis of every leaf; another parameter for
    each head, as in `(in, heads, dim)` with `(heads, dim, out)`, makes no stack.
    """
    axes = _matrix_axes(fields)
    contiguous = _contiguous(fields, shape)
    stacks = {
        event.axis
        for event in apart
        if event.axis in fields[OUTPUT]
        and (not contiguous or (event.matrices and event.axis in event.others))
    }
    rest = [axis for axis in fields[OUTPUT] if axis not in stacks]
    if stacks and rest:
        fields = {**fields, OUTPUT: rest}
        fields[STACKED] = sorted({*fields.get(STACKED, ()), *stacks})
    final = _matrix_axes(fields)
    if _contiguous(fields, shape):
        return _Reading(axes, final)
    stacked = dataclasses.replace(
        final,
        output=final.output[1:],
        stacked=tuple(sorted((*final.stacked, final.output[0]))),
    )
    return _Reading(
        axes,
        final,
        f"its output axes {final.output} are apart: outputs of one layer, or a stack "
        f"of layers along one of them, {stacked}?",
    )


def _matrix_axes(fields: Mapping[str, Sequence[int]]) -> MatrixAxes:
    return MatrixAxes(**{role: tuple(axes) for role, axes in fields.items()})


def _lent(axes: list[int], shape: Sequence[int]) -> list[int]:
    """An axis of size 1 that may be in another field, taken out of this one."""
    single = [axis for axis in axes if shape[axis] == 1]
    if len(axes) < 2 or not single:
        return []
    axes.remove(single[-1])
    return single[-1:]


def _contiguous(fields: Mapping[str, Sequence[int]], shape: Sequence[int]) -> bool:
    """Whether nothing but stacked axes lies between the output axes."""
    stacked = fields.get(STACKED, ())
    rest = [a for a, size in enumerate(shape) if size > 1 and a not in stacked]
    places = [place for place, axis in enumerate(rest) if axis in fields[OUTPUT]]
    return not places or places[-1] - places[0] == len(places) - 1


# ---- Order --------------------------------------------------------------------------


def _in_order(
    products: Sequence[Product],
    axes: Mapping[str, MatrixAxes],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[tuple[str, tuple[int, ...]]]:
    """Path and index of every kernel, in order of execution, each once.

    Stacks whose slices run side by side, or in an order that the program does not say,
    are one entry with an empty index.
    """
    whole = set()
    for product in products:
        stacked = axes[product.path].stacked
        picks = [product.picks[axis] for axis in stacked if axis in product.picks]
        if not picks or None in picks:
            whole.add(product.path)
    found: dict[tuple[str, tuple[int, ...]], None] = {}
    for product in products:
        path, ranges = product.path, []
        for axis in axes[path].stacked if path not in whole else ():
            pick = product.picks.get(axis)
            ranges.append(range(shapes[path][axis]) if pick is None else (pick,))
        for index in itertools.product(*ranges):
            found[path, index] = None
    return list(found)


def _parts(layer: Layer, shape: Sequence[int], axis: int, parts: Parts) -> list[Layer]:
    """A layer cut along an output axis."""
    if axis not in layer.axes.output:
        msg = (
            f"split: {layer.path!r} has the output axes {layer.axes.output}, got axis "
            f"{axis}."
        )
        raise ValueError(msg)
    size = shape[axis]
    if isinstance(parts, int):
        sizes = [size // parts] * parts if parts > 0 else []
    else:
        sizes = list(parts)
    if sum(sizes) != size or any(part < 1 for part in sizes):
        msg = (
            f"split: axis {axis} of {layer.path!r} has {size} outputs, which do not "
            f"fall into {parts} parts; give a divisor, or sizes that add up."
        )
        raise ValueError(msg)
    stops = list(itertools.accumulate(sizes))
    return [
        dataclasses.replace(layer, part=(axis, stop - size, stop))
        for size, stop in zip(sizes, stops, strict=True)
    ]


# ---- Followers ----------------------------------------------------------------------


def _targets(
    record: Record, products: Sequence[Product], norms: str
) -> tuple[dict[str, tuple[str, bool]], dict[str, str]]:
    """The kernel that each follower follows, and why others follow none.

    The second of each pair says whether the follower feeds that kernel.
    """
    made = {product.number: product.path for product in products}
    acts_on: dict[str, dict[str | None, None]] = {}
    feeds: dict[str, dict[str | None, None]] = {}
    is_norm = set()
    for event in record.events:
        if isinstance(event, Follower):
            acts_on.setdefault(event.path, {})[made.get(event.number)] = None
            if event.norm:
                is_norm.add(event.path)
        elif isinstance(event, Feed) and event.number in made:
            feeds.setdefault(event.path, {})[made[event.number]] = None
    found, why = {}, {}
    for path in record.shapes:
        kernels, fed = list(acts_on.get(path, ())), list(feeds.get(path, ()))
        feeding = False
        if (path in is_norm or fed) and len(kernels) < 2:
            feeding = norms == "before" and bool(fed)
            kernels = fed[:1] if feeding else kernels if norms != "none" else []
            why[path] = "norm: follows no layer under " + f"norms={norms!r}"
        if len(kernels) == 1 and kernels[0] is not None:
            found[path] = kernels[0], feeding
        elif kernels == [None]:
            why[path] = "acts on the output of what is no layer"
        elif kernels:
            names = ", ".join(repr(kernel) for kernel in kernels if kernel)
            why[path] = f"acts on the outputs of several layers: {names}"
    return found, why


def _with_followers(
    layers: Sequence[Layer],
    targets: Mapping[str, tuple[str, bool]],
    why_none: dict[str, str],
    record: Record,
) -> list[Layer]:
    """Layers with those that follow them, which are cut as their kernel is.

    A norm that feeds all slices or parts at once follows the first of them.
    """
    kernels = {layer.path for layer in layers}
    follows: dict[str, list[str]] = {}
    for path, (kernel, feeding) in targets.items():
        if path in kernels or record.is_left_out(path):
            continue
        own = [layer for layer in layers if layer.path == kernel]
        if all(_fits(layer, path, record.shapes) for layer in own):
            follows.setdefault(kernel, []).append(path)
            continue
        at_once = own[0].part or not own[0].index
        if feeding and at_once and len({layer.index for layer in own}) == 1:
            layers = _followed_first(layers, kernel, path, record.shapes)
        else:
            why_none[path] = f"cannot be cut as {kernel!r} is, which it acts on"
    return [
        dataclasses.replace(
            layer,
            follows=tuple(
                path
                for path in record.shapes
                if path in layer.follows or path in follows.get(layer.path, ())
            ),
        )
        for layer in layers
    ]


def _followed_first(
    layers: Sequence[Layer],
    kernel: str,
    path: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Layer]:
    """The same layers with one more that follows the first of a kernel's."""
    found: list[Layer] = []
    first = True
    for layer in layers:
        own = [layer]
        if layer.path == kernel and not layer.index and layer.axes.stacked:
            sizes = [range(shapes[kernel][axis]) for axis in layer.axes.stacked]
            own = [
                dataclasses.replace(layer, index=index)
                for index in itertools.product(*sizes)
            ]
        if layer.path == kernel and first:
            own[0] = dataclasses.replace(own[0], follows=(*own[0].follows, path))
            first = False
        found += own
    return found


def _fits(layer: Layer, path: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a leaf can be cut as the layer is: into the same slices and parts."""
    index = layer.index or (0,) * len(layer.axes.stacked)
    try:
        layer_of_leaf(
            [dataclasses.replace(layer, index=index, follows=(path,))], shapes
        )
    except ValueError:
        return False
    return True


# ---- Verdicts -----------------------------------------------------------------------


def _verdicts(
    record: Record,
    layers: Sequence[Layer],
    axes: Mapping[str, MatrixAxes],
    failures: Mapping[str, Unclear],
    why_none: Mapping[str, str],
) -> tuple[dict[str, str], dict[str, Unclear]]:
    """The verdict on every leaf, and the leaves that have none."""
    followers = {path: layer for layer in layers for path in layer.follows}
    looked_up = {p.path for p in record.of_type(Product) if not p.kernel}
    vectors = {p.path for p in record.of_type(Product) if p.kernel}
    failed: dict[str, dict[str, None]] = {}
    for event in record.of_type(Failed):
        failed.setdefault(event.path, {})[event.reason] = None
    said: dict[str, str] = {}
    for event in record.of_type(Note):
        said.setdefault(event.path, event.reason)
    notes: dict[str, str] = {}
    unclear: dict[str, Unclear] = {}
    for path in record.shapes:
        matrix = record.is_matrix(path)
        if record.is_left_out(path):
            notes[path] = "left out by axes="
        elif path in axes:
            notes[path] = "layer"
        elif path in failures:
            unclear[path] = failures[path]
        elif path in followers:
            notes[path] = f"follows {followers[path].path}"
        elif path in looked_up:
            notes[path] = "embedding: data looks up its rows"
        elif matrix and path in failed:
            unclear[path] = Unclear(tuple(failed[path]), None)
        elif path in why_none:
            notes[path] = why_none[path]
        elif path in said:
            notes[path] = said[path]
        elif path in vectors:
            notes[path] = "multiplies data as a vector, or as one for each slice"
        elif not matrix:
            used = path in record.seen
            notes[path] = "after no layer" if used else "not used"
        elif path in record.seen:
            unclear[path] = Unclear(("it meets no data",), None)
        else:
            unclear[path] = Unclear(("the forward pass does not use it",), None)
    return notes, unclear
