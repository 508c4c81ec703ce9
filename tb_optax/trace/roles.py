"""From the record of a forward pass to layers, and to a verdict on every leaf."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tb_optax.layers import Layer, MatrixAxes, parts_of, with_followers
from tb_optax.trace import record as does
from tb_optax.trace.record import OUTPUT, POOLED, REDUCTION, STACKED, Product, Record

NORMS = ("after", "before", "none")


class Unclear(NamedTuple):
    """Why a leaf cannot be read, and the axes to propose; None if likely no kernel."""

    reasons: tuple[str, ...]
    likely: MatrixAxes | None = None


class Roles(NamedTuple):
    """What a forward pass says of its parameters."""

    layers: tuple[Layer, ...]  # in order of execution
    notes: Mapping[str, str]  # the verdict on every leaf
    unclear: Mapping[str, Unclear]  # the leaves that have none
    likely: frozenset[str]  # of these, what may be kernels of products without data
    assumed: frozenset[str]  # what was assumed to be, and had to be


def roles_of(
    record: Record,
    norms: str,
    split: Mapping[str, tuple[int, int | Sequence[int]]],
) -> Roles:
    """Read a record."""
    entered = [n for _, event, n in record.events if event == does.ENTERS]
    products = {n: record.products[n] for n in entered if n not in record.auxiliary}
    products = {n: product for n, product in products.items() if product.kernel}
    axes, unclear, turned = _axes_of(record, products)
    products = {n: p for n, p in products.items() if p.path in axes}
    layers = []
    for path, index in _in_order(products.values(), axes, record.shapes):
        layer = Layer(path, axes[path], index=index)
        layers += parts_of(layer, record.shapes[path], split.get(path))
    targets, why = _targets(record, products, turned, norms)
    free = [p for p in record.shapes if p not in axes and not record.is_left_out(p)]
    targets = {path: targets[path] for path in free if path in targets}
    # What runs along outputs where its kernel is stacked.
    across = {
        path
        for path, (kernel, _) in targets.items()
        for own, of_kernel in record.aligned.get(path, ())
        if own in axes[kernel].stacked and of_kernel not in axes[kernel].stacked
    }
    layers, cannot = with_followers(layers, targets, record.shapes, across)
    for path in cannot:
        why[path] = f"cannot be cut as {targets[path][0]!r} is, which it acts on"
    notes, unclear = _verdicts(record, layers, why, unclear)
    likely = frozenset(record.likely & unclear.keys())
    assumed = frozenset(record.needed & record.assumed)
    return Roles(tuple(layers), notes, unclear, likely, assumed)


# ---- Axes ---------------------------------------------------------------------------


class _Reading(NamedTuple):
    """How one product reads its kernel."""

    axes: MatrixAxes  # with outputs that are apart among the stacked axes
    plain: MatrixAxes  # without regard to that
    doubt: str = ""  # why it is unclear whether they are


def _turned(axes: MatrixAxes) -> MatrixAxes:
    """Return the axes of the transpose, which has the same spectrum."""
    return dataclasses.replace(axes, reduction=axes.output, output=axes.reduction)


def _axes_of(
    record: Record, products: Mapping[int, Product]
) -> tuple[dict[str, MatrixAxes], dict[str, Unclear], set[int]]:
    """Find the axes of every kernel, what is unclear about others, and transposes.

    The last are numbers of products that use a kernel as its first use does not.
    """
    readings: dict[str, list[_Reading]] = {}
    turned: set[int] = set()
    failed: dict[str, dict[str, None]] = {}
    axes: dict[str, MatrixAxes] = {}
    for number, product in products.items():
        path, given = product.path, record.given.get(product.path)
        reading = _read(product, record.shapes[path], record.apart.get(number, ()))
        if given is not None:
            axes[path] = given
            own = reading[:2] if isinstance(reading, _Reading) else ()
            if given not in own and _turned(given) in own:
                turned.add(number)
        elif record.is_left_out(path) or reading is None:
            continue
        elif isinstance(reading, str):
            failed.setdefault(path, {})[reading] = None
        else:
            first, *_ = readings.setdefault(path, [reading])
            readings[path].append(reading)
            if {*first[:2]}.isdisjoint(reading[:2]):
                turned.add(number)
    unclear = {path: Unclear(tuple(reasons)) for path, reasons in failed.items()}
    for path, (first, *others) in readings.items():
        alike = {*first[:2], *map(_turned, first[:2])}
        clash = [other.axes for other in others if alike.isdisjoint(other[:2])]
        clear = next((reading for reading in others if not reading.doubt), first)
        if clash:
            reason = f"it is used with {first.axes} and with {clash[0]}"
            unclear[path] = Unclear((reason,), first.axes)
        elif clear.doubt:
            unclear[path] = Unclear((clear.doubt,), clear.axes)
        else:
            axes[path] = clear.axes
    return axes, {path: unclear[path] for path in unclear.keys() - axes.keys()}, turned


def _read(
    product: Product, shape: Sequence[int], apart: Iterable[tuple[int, bool]]
) -> _Reading | str | None:
    """Read a kernel in one product; return a reason if that fails, None for vectors."""
    if product.uses is None:
        return None
    fields = {role: list[int]() for role in (REDUCTION, OUTPUT, POOLED, STACKED)}
    spare = []
    for axis in range(len(shape)):
        use = product.uses.get(axis, frozenset())
        roles = use if isinstance(use, frozenset) else {STACKED}
        if len(roles) > 1:
            return f"its axis {axis} is partly {' and partly '.join(sorted(roles))}"
        own = fields[next(iter(roles))] if roles else spare
        own.append(axis)
    inputs, outputs = fields[REDUCTION], fields[OUTPUT]
    for own, other in ((inputs, outputs), (outputs, inputs)):
        single = [axis for axis in other if shape[axis] == 1]
        if not own and not spare and single and len(other) > 1:
            other.remove(single[-1])
            spare = single[-1:]
        if not own and spare:
            own.append(spare.pop())
    if not outputs or len(shape) < 2:
        return None
    if not inputs:
        return "none of its axes is summed over"
    inputs[:] = sorted(inputs + spare)
    return _with_stacks(fields, shape, apart)


def _with_stacks(
    fields: Mapping[str, list[int]],
    shape: Sequence[int],
    apart: Iterable[tuple[int, bool]],
) -> _Reading:
    """Move output axes that are apart to the stacked ones, where that is evident.

    A stack has its slices along the same axis of every leaf; another parameter for
    each head, as in `(in, heads, dim)` with `(heads, dim, out)`, makes no stack.
    """
    outputs, stacked = fields[OUTPUT], fields[STACKED]

    def with_stacked(moved: Iterable[int]) -> MatrixAxes:
        own = {
            **{role: tuple(axes) for role, axes in fields.items()},
            OUTPUT: tuple(axis for axis in outputs if axis not in moved),
            STACKED: tuple(sorted({*stacked, *moved})),
        }
        return MatrixAxes(**own)

    def contiguous(axes: MatrixAxes) -> bool:
        """Say whether nothing but stacked axes lies between the output axes."""
        rest = [a for a, n in enumerate(shape) if n > 1 and a not in axes.stacked]
        places = [place for place, axis in enumerate(rest) if axis in axes.output]
        return not places or places[-1] - places[0] == len(places) - 1

    plain = with_stacked([])
    loose = not contiguous(plain)
    moved = {axis for axis, sure in apart if axis in outputs and (loose or sure)}
    axes = with_stacked(moved) if moved < set(outputs) else plain
    if contiguous(axes):
        return _Reading(axes, plain)
    doubt = (
        f"its output axes {axes.output} are apart: outputs of one layer, or a stack of "
        f"layers along one of them, as {with_stacked(outputs[:1])}?"
    )
    return _Reading(axes, plain, doubt)


# ---- Order --------------------------------------------------------------------------


def _in_order(
    products: Iterable[Product],
    axes: Mapping[str, MatrixAxes],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[tuple[str, tuple[int, ...]]]:
    """List the path and index of every kernel once, in order of execution.

    Stacks whose slices run side by side, or in an order that the program does not say,
    are one entry with an empty index.
    """
    # The slice of each stacked axis that a product has, or else all or an unknown one.
    picks = [
        (p.path, [(p.uses or {}).get(axis) for axis in axes[p.path].stacked])
        for p in products
    ]
    whole = {
        path
        for path, own in picks
        if None in own or not any(isinstance(pick, int) for pick in own)
    }
    found: dict[tuple[str, tuple[int, ...]], None] = {}
    for path, own in picks:
        ranges = [
            [pick] if isinstance(pick, int) else range(shapes[path][axis])
            for axis, pick in zip(axes[path].stacked, own, strict=True)
        ]
        indices = [()] if path in whole else itertools.product(*ranges)
        found.update({(path, index): None for index in indices})
    return list(found)


# ---- Followers ----------------------------------------------------------------------


def _targets(
    record: Record, products: Mapping[int, Product], turned: set[int], norms: str
) -> tuple[dict[str, tuple[str, bool]], dict[str, str]]:
    """Find the kernel of each follower, and whether it feeds it, or why it has none."""
    acts_on = record.noted(does.FOLLOWS, does.NORM)
    feeds, of_norms = record.noted(does.FEEDS), record.noted(does.NORM)
    made = {number: product.path for number, product in products.items()}
    found, why = {}, {}
    for path in acts_on.keys() | feeds.keys():
        # What scales a layer scales in its gradient others, which says nothing.
        numbers = acts_on.get(path, [])
        forward = [number for number in numbers if number not in turned]
        shifts = path in record.added or path in of_norms
        numbers = forward or (numbers if shifts else [])
        kernels = list(dict.fromkeys(made.get(number) for number in numbers))
        feeding = False
        if path in {*of_norms, *feeds} and len(kernels) < 2:
            fed = [made[number] for number in feeds.get(path, ()) if number in made]
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
    """Give the verdict on every leaf, and list the leaves that have none.

    What is found later stands before what was found earlier.
    """
    failed, said = record.noted(does.FAILED), record.noted(does.SAID)
    vectors = [path for path in record.shapes if not record.is_matrix(path)]
    notes = dict.fromkeys(vectors, "after no layer")
    notes |= {path: "not used" for path in vectors if path not in record.seen}
    entered = {
        path: [record.products[number].kernel for number in numbers]
        for path, numbers in record.noted(does.ENTERS).items()
    }
    vector = "multiplies data as a vector, or as one for each slice"
    notes |= {path: vector for path, kernels in entered.items() if any(kernels)}
    notes |= {path: reasons[0] for path, reasons in said.items()}
    notes |= why
    looked_up = [path for path, kernels in entered.items() if not all(kernels)]
    notes |= dict.fromkeys(looked_up, does.LOOKED_UP)
    notes = {path: note for path, note in notes.items() if path not in failed}
    notes |= {path: f"follows {e.path}" for e in layers for path in e.follows}
    notes = {path: note for path, note in notes.items() if path not in unclear}
    notes |= {layer.path: "layer" for layer in layers}
    left_out = [path for path in record.shapes if record.is_left_out(path)]
    notes |= dict.fromkeys(left_out, "left out by axes=")
    notes |= dict.fromkeys(record.unreal, "complex: only real matrices are read")
    found = {}
    for path in [path for path in record.shapes if path not in notes]:
        used = path in record.seen
        idle = "it meets no data" if used else "the forward pass does not use it"
        reasons = failed.get(path, [idle])
        pairs = [reason for reason in reasons if reason.startswith(does.PRODUCT)]
        reasons = tuple(reason for reason in reasons if reason not in pairs[1:])
        computed = does.COMPUTED in reasons or does.BETWEEN_DATA in reasons
        second = any(reason.startswith(does.SECOND) for reason in reasons)
        flat = len(record.shapes[path]) == 2 and computed and not second
        own = Unclear(reasons, MatrixAxes((0,), (1,)) if flat else None)
        found[path] = unclear.get(path, own)
    return notes, found
