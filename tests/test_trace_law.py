"""The law of `trace_layers`: every leaf gets exactly one verdict.

`conftest.py` asserts it on every model that any test traces; here programs are drawn at
random, whose lists are known by construction.
"""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from notation import array, arrays, each, layers

import tb_optax
from tb_optax import Layer, trace_layers
from tb_optax.layers import Layers, expand_stacks
from tb_optax.leaves import leaves_of, shapes_of

X = array(2, 4, 4)


# A block has parameters, layers with their biases, and leaves that are no layers; sizes
# are equal on purpose, since nothing may depend on them.


def experts(x, w, b, v, c):
    y = jnp.einsum("btd,edf->betf", x, w) + b[:, None]
    y = jnp.einsum("betf,efd->betd", jax.nn.relu(y), v) + c[:, None]
    return y.mean(1)


BIASES = ("b", "b1", "bu", "bv", "c")
BLOCKS = {
    "w 4x4, b 4 -> w<b": lambda x, w, b: jnp.tanh(x @ w + b),
    "w 4x4 -> w:oi": lambda x, w: x + jax.nn.gelu(x @ w.T),
    "w 4x2x2, b 2x2, o 2x2x4 -> w:ioo<b o:iio": lambda x, w, b, o: jnp.einsum(
        "bthk,hkd->btd", jax.nn.relu(jnp.einsum("btd,dhk->bthk", x, w) + b), o
    ),
    "q k v o bias 4x4 -> q k v o": lambda x, **p: x + zoo.attention(x, **p),
    "g c 4 -> ": lambda x, g, c: zoo.layer_norm(x, g, c),
    "positions 4x4 -> ": lambda x, positions: x + positions,
    f"w v 2x4x4, b 2x4 -> {each(2, 'w[#]:sio<b v[#]:sio')}": zoo.loop,
    "w 3x4x4, b 3x4, v 3x4x4, c 3x4 -> w:sio<b v:sio<c": experts,
    "w1 w2 4x4, b1 4, u v 2x2x2, bu bv 2x2 -> w1<b1 u:sio<bu v:sio<bv w2": (
        zoo.block_diagonal
    ),
    "v 4x4, b 4 -> v<b": lambda x, v, b: (
        x @ zoo.ONE_KERNEL["printed"](v / jnp.linalg.norm(lax.stop_gradient(v)))
        + b
        + 0 * (v @ v.T).sum()
    ),
    "table 8x4 -> ": lambda x, table: x + table[np.arange(4) % 3],
}


def program_of(names: list[str]):
    """A program of these blocks, its parameters and its layers."""
    params, expected = {}, []
    for i, name in enumerate(names):
        shapes, _, found = name.partition(" -> ")
        params[f"{i}"] = arrays(shapes)
        for own in layers(found):
            follows = tuple(f"{i}/{path}" for path in own.follows)
            expected.append(Layer(f"{i}/{own.path}", own.axes, follows, own.index))

    def forward(params, x):
        for i, name in enumerate(names):
            x = BLOCKS[name](x, **params[f"{i}"])
        return x

    return forward, params, expected


@pytest.mark.parametrize("norms", ["after", "before", "none"])
@settings(max_examples=10, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=6))
def test_drawn_programs_have_the_lists_they_were_drawn_with(norms, names):
    forward, params, expected = program_of(names)
    if not expected:
        with pytest.raises(ValueError, match="finds no layer"):
            trace_layers(forward, params, X, norms=norms)
        return
    found = trace_layers(forward, params, X, norms=norms)
    # A norm that feeds all experts follows the first of them, which are listed then.
    shapes = shapes_of(leaves_of(params))
    found, expected = expand_stacks(found, shapes), expand_stacks(expected, shapes)
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.axes == other.axes, one.name
        module = one.path.split("/")[0]
        own = {f"{module}/{name}" for name in BIASES} & set(one.follows)
        assert own == set(other.follows), one.name


PARAMS = arrays("w o 4x4, b 4, embed 7x4, table 9x4, unused 4")


@functools.cache
def pooled() -> Layers:
    """A list with layers, followers, an embedding, a table and a vector."""

    def forward(p, tokens, x):
        x = x @ p["w"] + p["b"] + p["embed"][tokens] + p["table"][jnp.arange(4)]
        return x @ p["o"], p["unused"]

    return trace_layers(forward, PARAMS, array(2, 4, dtype=jnp.int32), X)


def test_the_list_is_a_tuple_that_keeps_its_notes():
    found, plain = pooled(), layers("w<b o")
    assert found == plain
    assert hash(found) == hash(plain)
    assert repr(found) == repr(plain)
    copy = pickle.loads(pickle.dumps(found))
    for part in (found[1:], found[:1], found[::-1], copy):
        assert isinstance(part, Layers)
        assert part.notes == found.notes
    assert found[1:] == plain[1:]
    assert isinstance(found[0], Layer)
    with pytest.raises(TypeError):
        found.notes["w"] = "none"  # pyrefly: ignore [unsupported-operation]


def test_notes_say_what_became_of_every_leaf():
    """And `describe` prints them."""
    free = {
        "embed": "embedding: data looks up its rows",
        "table": "look-up table: constants pick its rows",
        "unused": "not used",
    }
    assert pooled().notes == {"w": "layer", "o": "layer", "b": "follows w", **free}
    rows = tb_optax.describe(PARAMS, pooled()[1:], min_eigenvalues=1)
    assert {row["leaf"]: row["note"] for row in rows} == {
        **free,
        "b": "follows w, which is not in the list",
        "o": "4 eigenvalues",
        "w": "NOT IN THE LIST: a kernel with 4 eigenvalues keeps multiplier 1",
    }
