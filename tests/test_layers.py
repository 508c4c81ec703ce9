"""Layers as plain data: axes, slices, parts, paths, and what they refuse."""

import dataclasses
import itertools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tb_optax import Layer, MatrixAxes, find_layers
from tb_optax.layers import expand_stacks, layer_of_leaf
from tb_optax.leaves import leaves_of, path_of, shapes_of
from tb_optax.spectrum import as_matrices

DENSE = MatrixAxes((0,), (1,))
CONV = MatrixAxes((2,), (3,), pooled=(0, 1))
SCANNED = MatrixAxes((1,), (2,), stacked=(0,))
GRID = MatrixAxes((1,), (3,), pooled=(4,), stacked=(2, 0))

# Kernel shape, axes, shape of the matrices, how many are pooled.
READINGS = [
    ((8, 5), DENSE, (8, 5), 1),
    ((3, 3, 16, 32), CONV, (16, 32), 9),
    ((32, 16, 3, 3), MatrixAxes((1,), (0,), pooled=(2, 3)), (16, 32), 9),
    ((7, 16, 32), MatrixAxes((1,), (2,), pooled=(0,)), (16, 32), 7),
    ((64, 4, 16), MatrixAxes((0,), (1, 2)), (64, 64), 1),
    ((4, 16, 48), MatrixAxes((0, 1), (2,)), (64, 48), 1),
    ((4, 16, 48), MatrixAxes((1, 0), (2,)), (64, 48), 1),
    ((6, 8, 5), SCANNED, (8, 5), 1),
    ((2, 4, 3, 5, 6), GRID, (4, 5), 6),
]


@pytest.mark.parametrize(("shape", "axes", "matrix", "pooled"), READINGS)
def test_kernel_is_read_as_matrices(shape, axes, matrix, pooled):
    """Entry by entry, against the definition with explicit indices."""
    layer = Layer("w", axes)
    assert axes.rank == len(shape)
    assert layer.matrix_shape(shape) == matrix
    assert layer.eigenvalue_count(shape) == pooled * min(matrix)
    kernel = np.arange(math.prod(shape)).reshape(shape).astype(np.float32)
    matrices = np.asarray(as_matrices(jnp.asarray(kernel), axes))
    expected = np.empty_like(matrices)
    groups = (axes.stacked, axes.pooled, axes.reduction, axes.output)
    for index in itertools.product(*map(range, shape)):
        place = []
        for group in groups:
            position = 0
            for axis in group:
                position = position * shape[axis] + index[axis]
            place.append(position)
        expected[tuple(place)] = kernel[index]
    np.testing.assert_array_equal(matrices, expected)


def test_part_narrows_the_output():
    fused = Layer("qkv", MatrixAxes((0,), (1, 2)), part=(1, 2, 4))
    assert fused.matrix_shape((10, 6, 8)) == (10, 16)
    assert fused.eigenvalue_count((10, 6, 8)) == 10


@pytest.mark.parametrize(
    "fields",
    [
        ((0,), (0,)),
        ((0,), (2,)),
        ((1,), (2,)),
        ((0,), (1,), (1,)),
        ((0,), (1,), (), (3,)),
        ((0,), (-1,)),
        ((0, 0), (1,)),
    ],
    ids=str,
)
def test_axes_must_be_a_partition(fields):
    with pytest.raises(ValueError, match="every axis must be in exactly one field"):
        MatrixAxes(*fields)


@pytest.mark.parametrize("fields", [((), (0,)), ((0,), ()), ((), ()), ((), (), (0,))])
def test_axes_need_an_input_and_an_output(fields):
    with pytest.raises(ValueError, match="needs a reduction and an output axis"):
        MatrixAxes(*fields)


@pytest.mark.parametrize("index", [(0, 1), (1, 2, 3)])
def test_index_names_one_slice_of_each_stacked_axis(index):
    with pytest.raises(ValueError, match="index must be empty or name") as error:
        Layer("blocks/w", SCANNED, index=index)
    assert "'blocks/w'" in str(error.value)
    assert str(index) in str(error.value)
    with pytest.raises(ValueError, match="index must be empty or name"):
        Layer("w", DENSE, index=(0,))


def test_a_norm_before_a_fused_kernel_belongs_to_one_part():
    """It runs along the inputs, so that it cannot be cut as the outputs are."""
    parts = [Layer("kv", DENSE, part=(1, i, i + 6)) for i in (0, 6)]
    shapes = {"kv": (8, 12), "norm": (8,), "bias": (12,)}
    one = [dataclasses.replace(parts[0], follows=("norm",)), parts[1]]
    assert layer_of_leaf(one, shapes)["norm"].tolist() == [0]
    both = [dataclasses.replace(part, follows=("norm",)) for part in parts]
    with pytest.raises(ValueError, match="'norm' belongs to two layers"):
        layer_of_leaf(both, shapes)


@pytest.mark.parametrize("part", [(0, 0, 4), (2, 0, 4), (1, -1, 4), (1, 4, 4)])
def test_part_is_a_piece_of_an_output_axis(part):
    with pytest.raises(ValueError, match="part must be") as error:
        Layer("qkv", DENSE, part=part)
    assert "'qkv'" in str(error.value)
    assert str(part) in str(error.value)


def test_layers_are_values():
    """Frozen, hashable, equal by value, printable as code, editable, picklable."""
    layer = Layer("a/w", SCANNED, ("a/b",), index=(1,), part=(2, 0, 4))
    again = Layer("a/w", SCANNED, ("a/b",), index=(1,), part=(2, 0, 4))
    assert layer == again
    assert hash(layer) == hash(again)
    assert layer != dataclasses.replace(layer, index=(0,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.path = "b"  # pyrefly: ignore
    for value in (layer, DENSE, CONV, Layer("w", DENSE)):
        assert eval(repr(value)) == value
        assert pickle.loads(pickle.dumps(value)) == value
    # The checks run again on what is edited.
    with pytest.raises(ValueError, match="part must be"):
        dataclasses.replace(layer, part=(0, 0, 4))


def test_names_tell_slices_and_parts_apart():
    layers = [
        Layer("a/w", DENSE),
        Layer("a/w", SCANNED, index=(3,)),
        Layer("a/w", SCANNED, index=(3,), part=(2, 0, 64)),
        Layer("a/w", DENSE, part=(1, 64, 128)),
        Layer("a/w", GRID, index=(3, 1)),
    ]
    names = [layer.name for layer in layers]
    assert names == ["a/w", "a/w[3]", "a/w[3]{0:64}", "a/w{64:128}", "a/w[3,1]"]


# --- stacks -------------------------------------------------------------------------


def test_stacks_expand_in_order():
    layers = [
        Layer("one", DENSE, ("b",)),
        Layer("grid", GRID, ("g",)),
        Layer("some", SCANNED, index=(2,)),
        Layer("all", SCANNED, part=(2, 0, 1)),
    ]
    shapes = {
        "one": (4, 5),
        "grid": (2, 4, 3, 5, 6),
        "some": (3, 4, 5),
        "all": (2, 4, 5),
        "b": (5,),
        "g": (2, 1, 3),
        "frozen": None,
    }
    expanded = expand_stacks(layers, shapes)
    assert expand_stacks([*layers, Layer("frozen", DENSE)], shapes) == expanded
    # The order of `stacked`, (2, 0): axis 2 of size 3 is the outer one.
    grid = [
        dataclasses.replace(layers[1], index=(i, j)) for i in range(3) for j in (0, 1)
    ]
    both = [dataclasses.replace(layers[3], index=(i,)) for i in range(2)]
    assert expanded == (layers[0], *grid, layers[2], *both)
    assert expand_stacks(expanded, shapes) == expanded
    assert expand_stacks([], shapes) == ()


# --- paths --------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    """A boxed array, its leaf at `.value` as in nnx and `nn.Partitioned`."""

    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module with attributes, one of them called as the last entry of a box."""

    value: Box
    items: list


def test_paths_are_key_strings_without_the_box():
    zero = jnp.zeros(())
    tree = {"a": {"w": Box(zero)}, "m": Module(Box(zero), [zero, Box(zero)])}
    assert list(leaves_of(tree)) == ["a/w", "m/value", "m/items/0", "m/items/1"]
    # A dict key called value is a name like any other.
    assert list(leaves_of({"a": {"value": zero}})) == ["a/value"]
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    assert [path_of(keys) for keys, _ in flat] == list(leaves_of(tree))


def test_absent_leaves_have_no_shape():
    tree = {"m": optax.MaskedNode(), "n": None, "w": jnp.zeros((2, 3)), "s": 1.5}
    shapes = shapes_of(leaves_of(tree))
    assert shapes == {"m": None, "n": None, "w": (2, 3), "s": None}
    abstract = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    assert shapes_of(leaves_of(abstract)) == {"w": (2, 3)}


def test_a_kernel_at_the_root_has_no_followers_in_modules():
    tree = {"kernel": jnp.zeros((8, 4)), "Dense_0": {"bias": jnp.zeros(4)}}
    (layer,) = find_layers(tree)
    assert layer == Layer("kernel", MatrixAxes((0,), (1,)))


def test_two_leaves_of_one_path_are_an_error():
    zero = jnp.zeros(())
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        leaves_of({"a": {"b": zero}, "a/b": zero})
