"""The law of `trace_layers`: every leaf gets exactly one verdict.

`conftest.py` asserts it on every model that any test traces; here programs are drawn at
random, whose lists are known by construction.
"""

import functools
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import tb_optax
from tb_optax import Layer, MatrixAxes, trace_layers
from tb_optax.layers import Layers, expand_stacks
from tb_optax.leaves import leaves_of, shapes_of

DENSE = MatrixAxes((0,), (1,))
TURNED = MatrixAxes((1,), (0,))
QUERY = MatrixAxes((0,), (1, 2))
OUT = MatrixAxes((0, 1), (2,))
STACK = MatrixAxes((1,), (2,), stacked=(0,))
BATCH, TIME, WIDTH = 2, 4, 4


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# A block has parameters, layers with their biases, and leaves that are no layers; sizes
# are equal on purpose, since nothing may depend on them.
Block = tuple[dict[str, tuple[int, ...]], list[Layer], Callable[..., Any]]
W = (WIDTH, WIDTH)
BLOCKS: dict[str, Block] = {}


def block(layers: list[Layer], **shapes: tuple[int, ...]):
    def enter(apply: Callable[..., Any]):
        BLOCKS[apply.__name__] = (shapes, layers, apply)
        return apply

    return enter


@block([Layer("w", DENSE, ("b",))], w=W, b=(WIDTH,))
def dense(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


@block([Layer("w", TURNED)], w=W)
def turned(p, x):
    return x + jax.nn.gelu(x @ p["w"].T)


@block([Layer("w", QUERY, ("b",)), Layer("o", OUT)], w=(4, 2, 2), b=(2, 2), o=(2, 2, 4))
def heads(p, x):
    y = jnp.einsum("btd,dhk->bthk", x, p["w"]) + p["b"]
    return jnp.einsum("bthk,hkd->btd", jax.nn.relu(y), p["o"])


@block([Layer(n, DENSE) for n in "qkvo"], q=W, k=W, v=W, o=W, table=(TIME, TIME))
def attention(p, x):
    q, k, v = (x @ p[n] for n in "qkv")
    weights = jax.nn.softmax(q @ k.swapaxes(1, 2) + p["table"])
    return x + weights @ v @ p["o"]


@block([], g=(WIDTH,), c=(WIDTH,))
def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["g"] + p["c"]


@block([], positions=(TIME, WIDTH))
def positions(p, x):
    return x + p["positions"]


@block([Layer("w", STACK, ("b",), (i,)) for i in range(2)], w=(2, *W), b=(2, WIDTH))
def scanned(p, x):
    return lax.scan(lambda x, p: (jnp.tanh(x @ p["w"] + p["b"]), None), x, p)[0]


@block(
    [Layer("w", STACK, ("b",)), Layer("v", STACK, ("c",))],
    **{"w": (3, *W), "b": (3, WIDTH), "v": (3, *W), "c": (3, WIDTH)},
)
def experts(p, x):
    y = jnp.einsum("btd,edf->betf", x, p["w"]) + p["b"][:, None]
    y = jnp.einsum("betf,efd->betd", jax.nn.relu(y), p["v"]) + p["c"][:, None]
    return y.mean(1)


@block(
    [Layer("w", DENSE, ("b",)), Layer("blocks", STACK, ("c",))],
    **{"w": W, "b": (WIDTH,), "blocks": (2, 2, 2), "c": (2, 2)},
)
def block_diagonal(p, x):
    y = (x @ p["w"] + p["b"]).reshape(BATCH, TIME, 2, 2)
    y = jnp.einsum("btgd,gde->btge", y, p["blocks"]) + p["c"]
    return y.reshape(BATCH, TIME, WIDTH)


@block([Layer("w", DENSE, ("b",))], w=W, b=(WIDTH,))
def with_side_uses(p, x):
    jax.debug.callback(print, p["w"])
    w = p["w"] / jnp.linalg.norm(lax.stop_gradient(p["w"]))
    return x @ w + p["b"] + 0 * (p["w"] @ p["w"].T).sum()


@block([], table=(8, WIDTH))
def looked_up(p, x):
    return x + p["table"][np.arange(TIME) % 3]


NAMES = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=6)


def program_of(names: list[str]):
    """A program of these blocks, its parameters and its layers."""
    params, expected = {}, []
    for i, name in enumerate(names):
        shapes, layers, _ = BLOCKS[name]
        params[f"{i}"] = {leaf: array(*shape) for leaf, shape in shapes.items()}
        for layer in layers:
            follows = tuple(f"{i}/{path}" for path in layer.follows)
            expected.append(
                Layer(f"{i}/{layer.path}", layer.axes, follows, layer.index)
            )

    def forward(params, x):
        for i, name in enumerate(names):
            x = BLOCKS[name][2](params[f"{i}"], x)
        return x

    return forward, params, expected


@pytest.mark.parametrize("norms", ["after", "before", "none"])
@settings(max_examples=10, deadline=None)
@given(names=NAMES)
def test_drawn_programs_have_the_lists_they_were_drawn_with(norms, names):
    forward, params, expected = program_of(names)
    x = array(BATCH, TIME, WIDTH)
    if not expected:
        with pytest.raises(ValueError, match="finds no layer"):
            trace_layers(forward, params, x, norms=norms)
        return
    found = trace_layers(forward, params, x, norms=norms)
    # A norm that feeds all experts follows the first of them, which are listed then.
    shapes = shapes_of(leaves_of(params))
    found, expected = expand_stacks(found, shapes), expand_stacks(expected, shapes)
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.axes == other.axes, one.name
        own = {path for path in one.follows if path.split("/")[1] in "bc"}
        module = one.path.split("/")[0]
        own = {path for path in own if path.split("/")[0] == module}
        assert own == set(other.follows), one.name


@functools.cache
def pooled() -> Layers:
    """A list with layers, followers, an embedding, a table and a vector."""

    def forward(p, tokens, x):
        x = x @ p["w"] + p["b"] + p["embed"][tokens] + p["table"][jnp.arange(TIME)]
        return x @ p["o"], p["unused"]

    shapes = {"w": W, "b": (4,), "embed": (7, 4), "table": (9, 4), "o": W}
    params = {k: array(*shape) for k, shape in {**shapes, "unused": (4,)}.items()}
    tokens = jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32)
    return trace_layers(forward, params, tokens, array(BATCH, TIME, WIDTH))


def test_the_list_is_a_tuple_that_keeps_its_notes():
    layers = pooled()
    plain = (Layer("w", DENSE, ("b",)), Layer("o", DENSE))
    assert layers == plain
    assert hash(layers) == hash(plain)
    assert repr(layers) == repr(plain)
    for part in (
        layers[1:],
        layers[:1],
        layers[::-1],
        pickle.loads(pickle.dumps(layers)),
    ):
        assert isinstance(part, Layers)
        assert part.notes == layers.notes
    assert layers[1:] == plain[1:]
    assert isinstance(layers[0], Layer)
    with pytest.raises(TypeError):
        layers.notes["w"] = "none"  # pyrefly: ignore [unsupported-operation]


def test_notes_say_what_became_of_every_leaf():
    notes = pooled().notes
    assert notes["w"] == notes["o"] == "layer"
    assert notes["b"] == "follows w"
    assert notes["embed"] == "embedding: data looks up its rows"
    assert notes["table"] == "look-up table: constants pick its rows"
    assert notes["unused"] == "not used"


def test_describe_prints_the_notes():
    shapes = {"w": W, "b": (4,), "embed": (7, 4), "table": (9, 4), "o": W}
    params = {k: array(*shape) for k, shape in {**shapes, "unused": (4,)}.items()}
    rows = tb_optax.describe(params, pooled()[1:], min_eigenvalues=1)
    notes = {row["leaf"]: row["note"] for row in rows}
    assert notes == {
        "b": "follows w, which is not in the list",
        "embed": "embedding: data looks up its rows",
        "o": "4 eigenvalues",
        "table": "look-up table: constants pick its rows",
        "unused": "not used",
        "w": "NOT IN THE LIST: a kernel with 4 eigenvalues keeps multiplier 1",
    }
