"""From the record of a forward pass to layers, and to a verdict on every leaf."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tb_optax.layers import Layer, MatrixAxes, parts_of, with_followers
from tb_optax.trace.record import (
    BETWEEN_DATA,
    COMPUTED,
    OUTPUT,
    PRODUCT,
    REDUCTION,
    SECOND,
    STACKED,
    Apart,
    Feed,
    Follower,
    Product,
    Record,
    Said,
)

NORMS = ("after", "before", "none")
Shapes = Mapping[str, tuple[int, ...]]


class Unclear(NamedTuple):
    """Why a leaf cannot be read, and the axes to propose; None if likely no kernel."""

    reasons: tuple[str, ...]
    likely: MatrixAxes | None = None


class Roles(NamedTuple):
    """What a forward pass says of its parameters.

    Attributes:
        layers: in order of execution.
        notes: the verdict on every leaf.
        unclear: the leaves that have none.
        likely: those among them that may be kernels of products without data.
        assumed: leaves that were assumed to be, and that had to be.
    """

    layers: tuple[Layer, ...]
    notes: Mapping[str, str]
    unclear: Mapping[str, Unclear]
    likely: frozenset[str]
    assumed: frozenset[str]


def roles_of(
    record: Record, norms: str, split: Mapping[str, tuple[int, int | Sequence[int]]]
) -> Roles:
    """Read a record."""
    products = [
        event
        for event in record.of_type(Product)
        if event.kernel and event.number not in record.auxiliary
    ]
    axes, unclear, turned = _axes_of(record, products)
    products = [product for product in products if product.path in axes]
    layers = []
    for path, index in _in_order(products, axes, record.shapes):
        layer = Layer(path, axes[path], index=index)
        layers += parts_of(layer, record.shapes[path], split.get(path))
    targets, notes = _targets(record, products, turned, norms)
    own = axes.keys() | set(filter(record.is_left_out, record.shapes))
    targets = {
        path: targets[path] for path in record.shapes if path in targets.keys() - own
    }
    layers, cannot = with_followers(layers, targets, record.shapes)
    notes |= {
        path: f"cannot be cut as {targets[path][0]!r} is, which it acts on"
        for path in cannot
    }
    notes, unclear = _verdicts(record, layers, notes, unclear)
    assumed = {p.path for p in products if p.learned} & record.assumed
    likely = frozenset(record.likely & unclear.keys())
    return Roles(tuple(layers), notes, unclear, likely, frozenset(assumed))


# ---- Axes ---------------------------------------------------------------------------


class _Reading(NamedTuple):
    """How one product reads its kernel.

    Attributes:
        plain: without regard to outputs that may be apart.
        axes: with those that are apart among the stacked axes.
        doubt: why it is unclear whether they are.
    """

    plain: MatrixAxes
    axes: MatrixAxes
    doubt: str = ""

    def both(self, turned: bool = False) -> set[MatrixAxes]:
        """Both readings, or their transposes, which have the same spectrum."""
        return {
            dataclasses.replace(axes, reduction=axes.output, output=axes.reduction)
            if turned
            else axes
            for axes in (self.plain, self.axes)
        }


def _axes_of(
    record: Record, products: Sequence[Product]
) -> tuple[dict[str, MatrixAxes], dict[str, Unclear], set[int]]:
    """Axes of every kernel, what is unclear though it multiplies data, and transposes.

    The last are numbers of products that use a kernel as its first use does not.
    """
    readings: dict[str, list[_Reading]] = {}
    turned: set[int] = set()
    failed: dict[str, dict[str, None]] = {}
    axes: dict[str, MatrixAxes] = {}
    for product in products:
        path, shape = product.path, record.shapes[product.path]
        reading = _read(product, shape, record.apart.get(product.number, ()))
        if product.number in record.resampled and not product.data:
            reading = "constants multiply it along several axes: a resampled table?"
        given = record.given.get(path)
        if given is not None:
            axes[path] = given
        elif record.is_left_out(path) or reading is None:
            continue
        elif isinstance(reading, str):
            failed.setdefault(path, {})[reading] = None
        else:
            readings.setdefault(path, []).append(reading)
            first = readings[path][0]
            if first.both().isdisjoint(reading.both()):
                turned.add(product.number)
    unclear = {}
    for path, (first, *others) in readings.items():
        alike = first.both() | first.both(turned=True)
        clash = next((r for r in others if alike.isdisjoint(r.both())), None)
        clear = next((r for r in (first, *others) if not r.doubt), first)
        if clash is not None:
            reason = f"it is used with {first.axes} and with {clash.axes}"
            unclear[path] = Unclear((reason,), first.axes)
        elif clear.doubt:
            unclear[path] = Unclear((clear.doubt,), clear.axes)
        else:
            axes[path] = clear.axes
    for path in failed.keys() - axes.keys() - unclear.keys():
        unclear[path] = Unclear(tuple(failed[path]))
    return axes, unclear, turned


def _read(
    product: Product, shape: Sequence[int], apart: Sequence[Apart]
) -> _Reading | str | None:
    """Axes of a kernel in one product, why they are unclear, None for vectors."""
    if product.uses is None:
        return None
    fields: dict[str, list[int]] = {}
    spare = []
    for axis in range(len(shape)):
        use = product.uses.get(axis, frozenset())
        roles = use if isinstance(use, frozenset) else {STACKED}
        if len(roles) > 1:
            return f"its axis {axis} is partly {' and partly '.join(sorted(roles))}"
        own = fields.setdefault(next(iter(roles)), []) if roles else spare
        own.append(axis)
    for role, other in ((REDUCTION, OUTPUT), (OUTPUT, REDUCTION)):
        single = [axis for axis in fields.get(other, ()) if shape[axis] == 1]
        if role not in fields and not spare and single and len(fields[other]) > 1:
            fields[other].remove(single[-1])
            spare = single[-1:]
        if role not in fields and spare:
            fields[role] = [spare.pop()]
    if OUTPUT not in fields or len(shape) < 2:
        return None
    if REDUCTION not in fields:
        return "none of its axes is summed over"
    fields[REDUCTION] = sorted(fields[REDUCTION] + spare)
    return _with_stacks(fields, shape, apart)


def _with_stacks(
    fields: Mapping[str, list[int]], shape: Sequence[int], apart: Sequence[Apart]
) -> _Reading:
    """Moves output axes that are apart to the stacked ones, where that is evident.

    A stack has its slices along the same axis of every leaf; another parameter for
    each head, as in `(in, heads, dim)` with `(heads, dim, out)`, makes no stack.
    """
    outputs, stacked = fields[OUTPUT], fields.get(STACKED, [])

    def matrix_axes(moved: Iterable[int]) -> MatrixAxes:
        moved = set(moved)
        own = {
            OUTPUT: tuple(axis for axis in outputs if axis not in moved),
            STACKED: tuple(sorted({*stacked, *moved})),
        }
        return MatrixAxes(**{k: tuple(v) for k, v in fields.items()} | own)

    def contiguous(axes: MatrixAxes) -> bool:
        """Whether nothing but stacked axes lies between the output axes."""
        rest = [a for a, n in enumerate(shape) if n > 1 and a not in axes.stacked]
        places = [place for place, axis in enumerate(rest) if axis in axes.output]
        return not places or places[-1] - places[0] == len(places) - 1

    plain = matrix_axes([])
    loose = not contiguous(plain)
    moved = {
        event.axis
        for event in apart
        if event.axis in outputs
        and (loose or (event.matrices and event.axis in event.others))
    }
    axes = matrix_axes(moved) if moved < set(outputs) else plain
    if contiguous(axes):
        return _Reading(plain, axes)
    other = matrix_axes(outputs[:1])
    doubt = (
        f"its output axes {axes.output} are apart: outputs of one layer, or a stack of "
        f"layers along one of them, as {other}?"
    )
    return _Reading(plain, axes, doubt)


# ---- Order --------------------------------------------------------------------------


def _in_order(
    products: Sequence[Product], axes: Mapping[str, MatrixAxes], shapes: Shapes
) -> list[tuple[str, tuple[int, ...]]]:
    """Path and index of every kernel, in order of execution, each once.

    Stacks whose slices run side by side, or in an order that the program does not say,
    are one entry with an empty index.
    """

    def picks(product: Product) -> list[int | None]:
        """The slice of each stacked axis that a product has; None for all of them."""
        uses = product.uses or {}
        found = [uses.get(axis) for axis in axes[product.path].stacked]
        return [None if isinstance(use, frozenset) else use for use in found]

    def is_whole(product: Product) -> bool:
        uses = [(product.uses or {}).get(axis) for axis in axes[product.path].stacked]
        sliced = [use for use in uses if not isinstance(use, frozenset)]
        return not sliced or None in sliced

    whole = {product.path for product in products if is_whole(product)}
    found: dict[tuple[str, tuple[int, ...]], None] = {}
    for product in products:
        path = product.path
        pairs = zip(axes[path].stacked, picks(product), strict=True)
        ranges = [range(shapes[path][i]) if n is None else [n] for i, n in pairs]
        indices = itertools.product(*ranges) if path not in whole else [()]
        found.update({(path, index): None for index in indices})
    return list(found)


# ---- Followers ----------------------------------------------------------------------


def _targets(
    record: Record, products: Sequence[Product], turned: set[int], norms: str
) -> tuple[dict[str, tuple[str, bool]], dict[str, str]]:
    """The kernel of each follower and whether it feeds it; why others follow none."""
    made = {product.number: product.path for product in products}
    acts_on: dict[str, dict[str | None, None]] = {}
    feeds: dict[str, dict[str, None]] = {}
    events = record.of_type(Follower)
    forward = {event.path for event in events if event.number not in turned}
    for event in events:
        # What acts on a layer acts in its gradient on others, which says nothing.
        if event.number not in turned or event.path not in forward:
            acts_on.setdefault(event.path, {})[made.get(event.number)] = None
    for event in record.of_type(Feed):
        if event.number in made:
            feeds.setdefault(event.path, {})[made[event.number]] = None
    of_norms = {event.path for event in events if event.norm}
    found, why = {}, {}
    for path in acts_on.keys() | feeds.keys():
        kernels, fed = list(acts_on.get(path, ())), list(feeds.get(path, ()))
        feeding = False
        if path in of_norms | feeds.keys() and len(kernels) < 2:
            feeding = norms == "before" and bool(fed)
            kernels = fed[:1] if feeding else kernels if norms != "none" else []
            why[path] = f"norm: follows no layer with norms={norms!r}"
        if len(kernels) > 1:
            names = ", ".join(repr(kernel) for kernel in kernels if kernel)
            why[path] = f"acts on the outputs of several layers: {names}"
        elif kernels == [None]:
            why[path] = "acts on the output of what is no layer"
        elif kernels:
            found[path] = kernels[0], feeding
    return found, why


# ---- Verdicts -----------------------------------------------------------------------


def _verdicts(
    record: Record,
    layers: Sequence[Layer],
    why: Mapping[str, str],
    unclear: Mapping[str, Unclear],
) -> tuple[dict[str, str], dict[str, Unclear]]:
    """The verdict on every leaf, and the leaves that have none.

    What is found later stands before what was found earlier.
    """
    failed: dict[str, dict[str, None]] = {}
    for event in record.of_type(Said):
        if event.failed:
            failed.setdefault(event.path, {})[event.reason] = None
    vectors = [path for path in record.shapes if not record.is_matrix(path)]
    notes = dict.fromkeys(vectors, "after no layer")
    notes |= {path: "not used" for path in vectors if path not in record.seen}
    made = record.of_type(Product)
    vector = "multiplies data as a vector, or as one for each slice"
    notes |= {product.path: vector for product in made if product.kernel}
    notes |= {e.path: e.reason for e in record.of_type(Said)[::-1] if not e.failed}
    notes |= why
    looked_up = "embedding: data looks up its rows"
    notes |= {product.path: looked_up for product in made if not product.kernel}
    notes = {path: note for path, note in notes.items() if path not in failed}
    notes |= {path: f"follows {e.path}" for e in layers for path in e.follows}
    notes = {path: note for path, note in notes.items() if path not in unclear}
    notes |= {layer.path: "layer" for layer in layers}
    left_out = [path for path in record.shapes if record.is_left_out(path)]
    notes |= dict.fromkeys(left_out, "left out by axes=")
    notes |= dict.fromkeys(record.unreal, "complex: only real matrices are read")
    found = dict(unclear)
    for path in [path for path in record.shapes if path not in {*notes, *unclear}]:
        used = path in record.seen
        idle = "it meets no data" if used else "the forward pass does not use it"
        reasons = tuple(failed.get(path, [idle]))
        pairs = [reason for reason in reasons if reason.startswith(PRODUCT)]
        reasons = tuple(reason for reason in reasons if reason not in pairs[1:])
        computed = COMPUTED in reasons or BETWEEN_DATA in reasons
        second = any(reason.startswith(SECOND) for reason in reasons)
        flat = len(record.shapes[path]) == 2 and computed and not second
        found[path] = Unclear(reasons, MatrixAxes((0,), (1,)) if flat else None)
    in_order = [path for path in record.shapes if path in found]
    return notes, {path: found[path] for path in in_order if path not in notes}
