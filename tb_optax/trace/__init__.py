"""Layers read off the forward pass: order, axes and followers.

`walk` makes a jaxpr and goes through its equations; `rules` say what each primitive
does to the values, which are `views`, and write down in the `record` which parameter
enters which product; `roles` reads layers from it, and a verdict on every leaf.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tb_optax.layers import Layers, MatrixAxes, check_rank
from tb_optax.leaves import listing, match_paths
from tb_optax.trace.record import Record
from tb_optax.trace.roles import NORMS, Roles, Unclear, roles_of
from tb_optax.trace.rules import RULES
from tb_optax.trace.walk import program_of, run

Parts = int | Sequence[int]


def trace_layers(
    fn: Callable[..., Any],
    params: Any = None,
    *inputs: Any,
    axes: Mapping[str, MatrixAxes | None] | None = None,
    strict: bool = True,
    norms: str = "after",
    split: Mapping[str, tuple[int, Parts]] | None = None,
) -> Layers:
    r"""Find the layers of a model by what its forward pass does with its parameters.

    The forward pass is traced once, abstractly: nothing is computed, arrays may be
    `jax.ShapeDtypeStruct`.  A parameter that enters a product with data is a kernel;
    the product says which of its axes are inputs, outputs, positions of a convolution
    or a stack.  Kernels are followed through transposes, reshapes, slices, loops,
    branches and sharding, and through what scales or shifts them.  Whatever is no
    parameter is data, constants too.

    | the parameter | is |
    |---|---|
    | in a matrix product or a convolution with data | a kernel |
    | scanned, or batched in a product | a kernel with `stacked` axes |
    | used both ways, as in a gradient | one layer; the first use names the outputs |
    | looked up, by data or by constants | no layer; one if it is a head too |
    | a vector that a kernel is applied to (a learned query) | no layer |
    | changed by data, entry by entry (a mask) | a kernel; a product asks for its axes |
    | added to or multiplied with a kernel's output | its follower: bias, layer scale |
    | the scale or offset of a norm | a follower as `norms` says |
    | what a kernel is computed from (gain, LoRA factors) | the kernel's follower |
    | acting on the outputs of several kernels, or along positions | no follower |

    Layers come in order of execution.  A loop's stacks are listed slice by slice, as
    they run; slices that run side by side (experts, ensembles), or in an order that
    the program does not say, are one entry, which `layer_analysis` expands.

    A norm follows the newest layer that its input came through (`norms="after"`), the
    first layer or part that it feeds, if any (`"before"`), or none (`"none"`); none if
    its parameters are used in several places.  In a sum the branch that varies along
    more dimensions counts, then the newer one.  At the start of a scanned block and
    after a scan the newest layer is another iteration's slice: a norm there follows
    none.

    Args:
        fn: the forward pass, `fn(params, *inputs)`; or an nnx module, called as
            `module(*inputs)` with its other state as constants: then its inputs come
            next, in the place of `params`.
        params: any pytree of arrays; an nnx module stands for its `nnx.Param` leaves.
        *inputs: pytrees; leaves that are no arrays are static.
        axes: fnmatch patterns on paths, each with the axes of the kernels it matches,
            or None for leaves that are neither kernels nor followers; the first match
            wins.
        strict: False leaves out what is unclear, with one warning that lists it.
        norms: "after", "before" or "none".
        split: fnmatch patterns on paths, each with `(axis, parts)`: kernels that hold
            several layers side by side along an output axis, as a fused qkv does;
            `parts` is their number or their sizes.  Without it a kernel stays whole.

    Returns:
        Layers in order of execution, a tuple whose `notes` say what became of every
        leaf.

    Raises:
        ValueError: if a leaf with two axes longer than 1 has no place, naming each such
            leaf, what was tried, and the `axes` to paste: output axes that are apart
            (`einsum("td,edf->tef")`: experts or heads?), uses that disagree, products
            of parameters alone (learned queries, or factors of one kernel?), a
            primitive that is not known, a leaf that meets no data; if no layer is found
            at all; or if an option does not fit.
        NotImplementedError: if this JAX names the parameters of a loop differently.

    >>> import jax, jax.numpy as jnp
    >>> def forward(params, x):
    ...     x = jax.nn.relu(x @ params["first"] + params["bias"])
    ...     return x @ params["second"].T
    >>> shapes = {"first": (8, 16), "bias": (16,), "second": (4, 16)}
    >>> params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    >>> x = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    >>> for layer in trace_layers(forward, params, x):
    ...     print(layer)
    Layer('first', MatrixAxes((0,), (1,)), follows=('bias',))
    Layer('second', MatrixAxes((1,), (0,)))

    References:
        Zhou et al, `Temperature Balancing, Layer-wise Weight Analysis, and Neural
        Network Training <https://arxiv.org/abs/2312.00359>`_, 2023
    """
    if norms not in NORMS:
        allowed = ", ".join(map(repr, NORMS))
        msg = f"norms must be one of {allowed}, got norms = {norms!r}."
        raise ValueError(msg)
    program = program_of(fn, params, inputs)
    shapes = program.shapes
    floating = {p: shape for p, shape in shapes.items() if p not in program.notes}
    given = match_paths("axes", axes, shapes)
    parts = match_paths("split", split, shapes)
    kernels = {path: own for path, own in given.items() if own is not None}
    for path, own in kernels.items():
        check_rank(own, path, shapes[path])

    def read(assumed: frozenset[str] = frozenset()) -> Roles:
        record = Record(floating, given, assumed, program.unreal)
        run(record, RULES, program.jaxpr, program.values)
        return roles_of(record, norms, parts)

    roles = _with_assumptions(read)
    found = {layer.path for layer in roles.layers}
    for path in [path for path in kernels if path not in found]:
        msg = (
            f"axes: the forward pass multiplies no data with {path!r}, which "
            f"therefore has no place among the layers; give None for it."
        )
        if path in program.unreal:
            msg = f"axes: {path!r} is complex, and no layer; give None for it."
        raise ValueError(msg)
    if roles.unclear:
        _complain(roles.unclear, shapes, strict)
    elif not (roles.layers or given):
        matrices = [path for path, shape in shapes.items() if len(shape) > 1]
        why = f"none of the {len(shapes)} parameters has two axes"
        if matrices:
            why = (
                f"the forward pass multiplies no data with {listing(matrices)}. Call "
                f"trace_layers(fn, params, *inputs) with the data among the inputs"
            )
        msg = f"trace_layers finds no layer: {why}."
        raise ValueError(msg)
    unclear = {p: f"unclear: {'; '.join(u.reasons)}" for p, u in roles.unclear.items()}
    return Layers(roles.layers, {**roles.notes, **unclear, **program.notes})


def _with_assumptions(read: Callable[..., Roles]) -> Roles:
    """Read again with the likely kernels of products without data taken for kernels.

    The rest comes out right then, and the error can say how to read them.
    """
    roles = read()
    assumed, known = frozenset[str](), dict(roles.unclear)
    while likely := roles.likely - assumed:
        assumed |= likely
        roles = read(assumed)
        known = {**roles.unclear, **known}
    axes = {layer.path: layer.axes for layer in roles.layers}
    if assumed - axes.keys():
        roles = read(assumed & axes.keys())
    needed = [path for path in axes if path in roles.assumed]
    unclear = dict(roles.unclear)
    unclear |= {path: known[path]._replace(likely=axes[path]) for path in needed}
    # What stands in the place of data for them may be a kernel as well.
    reasons = {reason for path in needed for reason in unclear[path].reasons}
    for path, why in known.items():
        if any(repr(path) in reason for reason in reasons):
            unclear.setdefault(path, why._replace(likely=None))
    layers = [layer for layer in roles.layers if layer.path not in unclear]
    return roles._replace(layers=tuple(layers), unclear=unclear)


def _complain(
    unclear: Mapping[str, Unclear], shapes: Mapping[str, tuple[int, ...]], strict: bool
) -> None:
    """Raise for the leaves whose axes cannot be told, or warn and go on."""
    # Kernels come first, in the order of execution.
    paths = sorted(unclear, key=lambda path: unclear[path].likely is None)
    listed = "\n".join(
        f"  {path!r} of shape {shapes[path]}: {'; '.join(unclear[path].reasons)}"
        for path in paths
    )
    proposed = {path: unclear[path].likely for path in paths}
    count = "1 leaf" if len(paths) == 1 else f"{len(paths)} leaves"
    msg = (
        f"trace_layers cannot tell how to read {count}"
        f"{'' if strict else ' and leaves them out'}:\n{listed}\n"
        f"Pass axes={proposed}: MatrixAxes(reduction, output, pooled=..., stacked=...) "
        f"for a kernel, or None for a leaf that is no kernel; patterns such as "
        f"'*/kernel' settle many at once."
    )
    if strict:
        raise ValueError(msg)
    warnings.warn(msg, stacklevel=3)
