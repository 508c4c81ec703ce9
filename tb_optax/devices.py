"""Matrices spread over the devices of a mesh, and numbers that all of them share.

Every eigenproblem is solved on one device, once, and its eigenvalues are sent to the
others: nothing is computed twice, and no rounding of one device's linear algebra can
set its copy of the multipliers apart from another's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

# Matrices of a bucket, in one or several arrays.
Bucket: TypeAlias = list[Float[Array, "_ _ _"]]


def mesh_of(arrays: Mapping[str, Any], given: Mesh | AbstractMesh | None) -> Any:
    """The mesh to work on: that of the context, the given one, or that of the arrays.

    Args:
        arrays: arrays by name, concrete or traced.
        given: a mesh; None looks for one.

    Returns:
        An `AbstractMesh`, or None where there is none.

    Raises:
        ValueError: if another mesh is set than is given; or, inside `shard_map`, if
            an array differs from device to device.
    """
    context = jax.sharding.get_abstract_mesh()
    if given is not None and not context.empty and given.shape != context.shape:
        msg = (
            f"mesh = {dict(given.shape)}, but the mesh in use is "
            f"{dict(context.shape)}; leave mesh out, or give that one."
        )
        raise ValueError(msg)
    for name, array in arrays.items():
        varying = _varying_axes(array)
        if varying:
            msg = (
                f"layer {name!r}: inside shard_map its kernel differs along the mesh "
                f"axes {', '.join(map(repr, sorted(varying)))}, so that no device "
                f"holds the whole; analyze outside of shard_map, or gather it first "
                f"(in_specs=P(), or jax.lax.all_gather)."
            )
            raise ValueError(msg)
    meshes = [context] if given is None else [context, given]
    meshes += [jax.typeof(array).sharding.mesh for array in arrays.values()]
    found = next((mesh for mesh in meshes if not mesh.empty), None)
    return found.abstract_mesh if isinstance(found, Mesh) else found


def placed(arrays: Mapping[str, Any], mesh: Mesh | AbstractMesh | None) -> Any:
    """The arrays, copied to all devices of a mesh where they lie outside of it."""
    if not isinstance(mesh, Mesh):
        return dict(arrays)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(array):
        outside = jax.typeof(array).sharding.mesh.empty
        if isinstance(array, jax.core.Tracer) or not outside:
            return array
        return jax.device_put(array, everywhere)

    return {name: place(array) for name, array in arrays.items()}


def on_mesh(mesh: AbstractMesh | None, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function with all axes of a mesh automatic; its results are replicated.

    Args:
        mesh: what `mesh_of` found; None calls the function as it is.
        function: arrays to a tree of arrays.
        *args: arrays, sharded in any way.
    """
    if mesh is None:
        return function(*args)

    def replicated(*args):
        return jax.tree.map(_constrain_to_all, function(*args))

    with jax.sharding.use_abstract_mesh(mesh):
        if mesh.explicit_axes:
            replicated = jax.sharding.auto_axes(
                replicated, axes=mesh.explicit_axes, out_sharding=PartitionSpec()
            )
        return replicated(*args)


def over_devices(
    function: Callable[[list[Bucket]], Any], buckets: Sequence[Bucket]
) -> Any:
    """A function of buckets of matrices, on each device for its share of each bucket.

    A bucket's matrices, all of one shape, are padded with zero matrices to a multiple
    of the number of devices. They reach their devices one mesh axis at a time, which
    XLA compiles to all-to-alls and permutes: nowhere is a kernel put together that
    was not whole before. What the function returns is gathered, and cut to size: of a
    row, if there are rows, as many numbers as the matrix has eigenvalues; zeros follow.

    Inside `shard_map` each device takes its share of what all of them hold.

    Args:
        function: buckets to a tree of arrays with all matrices, bucket by bucket,
            along the first axis.
        buckets: matrices, each bucket's in arrays of one shape where they are spread.

    Returns:
        The function's outputs for all matrices, equal on all devices.

    >>> def traces(buckets):
    ...     traces = [jnp.trace(w, axis1=1, axis2=2) for [w] in buckets]
    ...     return jnp.concatenate(traces)
    >>> print(over_devices(traces, [[jnp.ones((2, 3, 3))], [jnp.ones((1, 2, 2))]]))
    [3. 3. 2.]
    """
    axes = _axes()
    if not (axes.automatic or axes.manual):
        return function(list(buckets))
    sizes = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(sizes[axis] for axis in (*axes.automatic, *axes.manual))
    stacks = [jnp.concatenate(bucket) for bucket in buckets]
    counts = [len(stack) for stack in stacks]
    padding = [(0, -count % devices) for count in counts]
    stacks = [
        jnp.pad(stack, (pad, (0, 0), (0, 0)))
        for stack, pad in zip(stacks, padding, strict=True)
    ]

    def apart(whole, stacks):
        """What there is of each bucket."""
        ends = np.cumsum([len(stack) for stack in stacks])
        found = []
        for stack, end in zip(stacks, ends, strict=True):
            cut = (slice(end - len(stack), end), slice(min(stack.shape[1:])))
            found.append(jax.tree.map(lambda x, cut=cut: x[cut[: x.ndim]], whole))
        return found

    def share(*stacks):
        if not axes.manual:
            return apart(function([[stack] for stack in stacks]), stacks)
        index = jax.lax.axis_index(axes.manual)
        parts = math.prod(sizes[axis] for axis in axes.manual)

        def own(stack):
            size = len(stack) // parts
            return jax.lax.dynamic_slice_in_dim(stack, index * size, size)

        def shared(column):
            number = column.astype(jnp.promote_types(column.dtype, jnp.int32))
            whole = jnp.zeros((len(column) * parts, *column.shape[1:]), number.dtype)
            start = index * len(column)
            whole = jax.lax.dynamic_update_slice_in_dim(whole, number, start, 0)
            return jax.lax.psum(whole, axes.manual).astype(column.dtype)

        stacks = [own(stack) for stack in stacks]
        whole = function([[stack] for stack in stacks])
        return jax.tree.map(shared, apart(whole, stacks))

    if axes.automatic:
        batch = PartitionSpec(axes.automatic)
        stacks = [_by_batch(stack, axes.automatic, sizes) for stack in stacks]
        share = jax.shard_map(
            share, in_specs=batch, out_specs=batch, axis_names=set(axes.automatic)
        )
    results = jax.tree.map(_constrain_to_all, share(*stacks))
    results = [
        jax.tree.map(lambda column, count=count: column[:count], result)
        for result, count in zip(results, counts, strict=True)
    ]
    return jax.tree.map(lambda *columns: _joined(columns), *results)


def _joined(columns):
    """One array behind the other, filled with zeros to the longest rows."""
    shape = np.max([column.shape[1:] for column in columns], axis=0)
    padded = [
        jnp.pad(column, [(0, 0), *((0, int(d)) for d in shape - column.shape[1:])])
        for column in columns
    ]
    return jnp.concatenate(padded)


class _Axes(NamedTuple):
    """Mesh axes that XLA may partition over, and those of a `shard_map` around."""

    automatic: tuple[str, ...]
    manual: tuple[str, ...]


def _axes() -> _Axes:
    mesh = jax.sharding.get_abstract_mesh()
    # With check_vma=False nothing says whether kernels differ along a manual axis:
    # then each device analyzes what it holds.
    tracked = [a for a in mesh.manual_axes if _varying_axes(jax.lax.axis_index(a))]
    return _Axes(mesh.auto_axes, tuple(tracked))


def _varying_axes(array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _by_batch(stack, axes: Sequence[str], sizes: Mapping[str, int]):
    """Moves every mesh axis to the batch: over rows and columns first, then in turn."""
    left, beside = list(stack.shape), ([], [], [])
    for number, axis in enumerate(axes):
        for dim in (1, 2) if number % 2 == 0 else (2, 1):
            if left[dim] % sizes[axis] == 0:
                left[dim] //= sizes[axis]
                beside[dim].append(axis)
                break
    batch = beside[0]
    for axis in (None, *axes):
        if axis is not None:
            batch.append(axis)
            for dim in (1, 2):
                if axis in beside[dim]:
                    beside[dim].remove(axis)
        spec = PartitionSpec(*(tuple(names) or None for names in beside))
        stack = jax.lax.with_sharding_constraint(stack, spec)
    return stack


def _constrain_to_all(column):
    if not jax.sharding.get_abstract_mesh().auto_axes:
        return column
    return jax.lax.with_sharding_constraint(column, PartitionSpec())
