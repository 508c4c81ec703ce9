"""Matrices spread over the devices of a mesh, and numbers that all of them share.

Every eigenproblem is solved on one device, once, and its eigenvalues are sent to the
others: no rounding of one device's linear algebra can set its multipliers apart.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

# Matrices of one shape.
Bucket: TypeAlias = Float[Array, "_ _ _"]


def mesh_of(arrays: Mapping[str, Any], given: Mesh | AbstractMesh | None) -> Any:
    """Find the abstract mesh to work on: of the context, the given one, or the arrays'.

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
    """Copy arrays that lie outside of a mesh to all of its devices."""
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
    """Call a function with all axes of a mesh automatic, and replicate its results."""
    if mesh is None:
        return function(*args)

    def called(*args):
        return jax.tree.map(replicated, function(*args))

    with jax.sharding.use_abstract_mesh(mesh):
        if mesh.explicit_axes:
            called = jax.sharding.auto_axes(
                called, axes=mesh.explicit_axes, out_sharding=PartitionSpec()
            )
        return called(*args)


def over_devices(
    function: Callable[[list[Bucket]], list[Any]], buckets: Sequence[Bucket]
) -> list[Any]:
    """Call a function of buckets of matrices, on each device for its share of them.

    A bucket's matrices are padded with zero matrices to a multiple of the number of
    devices. They reach their devices one mesh axis at a time, which XLA compiles to
    all-to-alls and permutes: nowhere is a kernel put together that was not whole
    before. Inside `shard_map` each device takes its share of what all of them hold.
    What the function returns, arrays with the matrices along their first axis, is
    gathered, and equal on all devices.

    >>> def traces(buckets):
    ...     return [jnp.trace(w, axis1=1, axis2=2) for w in buckets]
    >>> print(*over_devices(traces, [jnp.ones((2, 3, 3)), jnp.ones((1, 2, 2))]))
    [3. 3.] [2.]
    """
    automatic, manual = _axes()
    if not (automatic or manual):
        return function(list(buckets))
    sizes = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(sizes[axis] for axis in (*automatic, *manual))
    padded = [
        jnp.pad(bucket, ((0, -len(bucket) % devices), (0, 0), (0, 0)))
        for bucket in buckets
    ]

    def share(*buckets):
        if manual:
            return _shared_out(function, buckets, manual)
        return function(list(buckets))

    if automatic:
        batch = PartitionSpec(automatic)
        padded = [_by_batch(bucket, automatic, sizes) for bucket in padded]
        share = jax.shard_map(
            share, in_specs=batch, out_specs=batch, axis_names=set(automatic)
        )
    results = jax.tree.map(replicated, share(*padded))
    return [
        jax.tree.map(operator.itemgetter(slice(len(bucket))), result)
        for bucket, result in zip(buckets, results, strict=True)
    ]


def _shared_out(function, buckets: Sequence[Bucket], axes: Sequence[str]) -> list[Any]:
    """Call a function on this device's share of what all devices hold, and gather."""
    index = jax.lax.axis_index(axes)
    parts = jax.lax.axis_size(axes)

    def own(bucket):
        size = len(bucket) // parts
        return jax.lax.dynamic_slice_in_dim(bucket, index * size, size)

    def shared(column):
        # Truth values cannot be added.
        number = column.astype(jnp.int32) if column.dtype == bool else column
        whole = jnp.zeros((len(column) * parts, *column.shape[1:]), number.dtype)
        start = index * len(column)
        whole = jax.lax.dynamic_update_slice_in_dim(whole, number, start, 0)
        return jax.lax.psum(whole, axes).astype(column.dtype)

    return jax.tree.map(shared, function([own(bucket) for bucket in buckets]))


def _axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the axes that XLA may partition over, and those of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    # With check_vma=False nothing says whether kernels differ along a manual axis:
    # then each device analyzes what it holds.
    tracked = [a for a in mesh.manual_axes if _varying_axes(jax.lax.axis_index(a))]
    return mesh.auto_axes, tuple(tracked)


def _varying_axes(array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _by_batch(stack, axes: Sequence[str], sizes: Mapping[str, int]):
    """Move every mesh axis to the batch: over rows and columns first, then in turn."""
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


def replicated(array):
    """Give every device the whole of an array, where XLA may partition."""
    if not jax.sharding.get_abstract_mesh().auto_axes:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec())
