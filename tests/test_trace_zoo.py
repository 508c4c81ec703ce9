"""`trace_layers` on programs of the kinds that it once read wrongly."""

import functools
import re
from typing import Any

import jax
import pytest
import zoo
from zoo import CASES, Case

from tb_optax import Layer, MatrixAxes, trace_layers
from tb_optax.leaves import leaves_of


def trace(case: Case, **options: Any) -> tuple[Layer, ...]:
    """Layers of a program; given axes that a message proposes stand before its own."""
    axes = {**options.pop("axes", {}), **case.options.get("axes", {})}
    options = {**case.options, **options, **({"axes": axes} if axes else {})}
    return trace_layers(case.forward, case.params, *case.inputs, **options)


def check(found: tuple[Layer, ...], case: Case) -> None:
    """Asserts the same layers in the same order; followers in any order."""
    assert case.layers is not None, f"an error should have named {case.named}"
    assert [layer.name for layer in found] == [layer.name for layer in case.layers]
    for layer, expected in zip(found, case.layers, strict=True):
        assert layer.axes == expected.axes, layer.name
        follows = set(layer.follows) - case.free
        assert follows == set(expected.follows), layer.name


def proposal(message: str) -> dict[str, MatrixAxes | None]:
    """The dict that an error proposes for `axes`, as a user would paste it."""
    start = message.index("axes={") + len("axes=")
    for stop in re.finditer("}", message[start:]):
        text = message[start : start + stop.end()]
        if text.count("{") == text.count("}"):
            return eval(text, {"MatrixAxes": MatrixAxes})
    msg = f"no dict in {message!r}"
    raise AssertionError(msg)


def leaves_named(message: str) -> set[str]:
    """Leaves that an error lists, one line each."""
    return set(re.findall(r"^  '([^']+)' of shape", message, re.MULTILINE))


@functools.cache
def outcome(name: str) -> tuple[tuple[Layer, ...], str]:
    """The layers that are found, or none and the error."""
    try:
        return trace(CASES[name]), ""
    except ValueError as error:
        return (), str(error)


@pytest.mark.parametrize("name", CASES)
def test_every_leaf_of_the_table_has_a_verdict(name):
    """The table itself is complete: it leaves nothing unsaid."""
    case = CASES[name]
    leaves = leaves_of(case.params)
    assert set(case.named) <= leaves.keys()
    for path in case.named:
        assert sum(size > 1 for size in leaves[path].shape) > 1, "needs no reading"
    if case.layers is None:
        assert case.named
        return
    said = case.none | case.free
    for layer in case.layers:
        said |= {layer.path, *layer.follows}
    assert said == leaves.keys()


@pytest.mark.parametrize("name", CASES)
def test_layers(name):
    """The list that the program means; or, where that is lawful, an error."""
    case = CASES[name]
    found, error = outcome(name)
    if not error:
        check(found, case)
        return
    assert case.named, f"raised: {error}"
    named = leaves_named(error)
    assert set(case.named) <= named, error
    assert case.says in error
    if case.layers is not None:
        clear = {layer.path for layer in case.layers} - set(case.named)
        assert not clear & named, f"these are clear: {clear & named}"


UNCLEAR = [name for name, case in CASES.items() if case.named]


@pytest.mark.parametrize("name", UNCLEAR)
def test_the_proposed_dict_settles_everything(name):
    """It has exactly the leaves that are named, kernels first, and can be pasted."""
    case = CASES[name]
    _, error = outcome(name)
    if not error:
        assert case.layers is not None
        return
    proposed = proposal(error)
    assert set(proposed) == leaves_named(error)
    assert next(iter(proposed)) in case.named
    paths = {layer.path for layer in trace(case, axes=proposed)}
    assert paths >= {path for path, axes in proposed.items() if axes is not None}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_unclear_does_not_spoil_the_rest(name):
    """Without strictness the named leaves are left out, and nothing else."""
    case = CASES[name]
    _, error = outcome(name)
    if not error or case.layers is None:
        return
    named = leaves_named(error)
    with pytest.warns(UserWarning, match=f"'{case.named[0]}'"):
        found = trace(case, strict=False)
    expected = [layer.name for layer in case.layers if layer.path not in named]
    assert [layer.name for layer in found] == expected


def test_an_axis_name_that_nobody_binds_is_explained():
    """As `BatchNorm(axis_name="batch")` needs one, outside `vmap` or `pmap`."""

    def forward(p, x):
        x = x @ p["w"]
        return x - jax.lax.pmean(x.mean(0), "batch")

    params = {"w": zoo.array(8, 6)}
    with pytest.raises((NameError, ValueError)) as error:
        trace_layers(forward, params, zoo.X)
    text = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert "batch" in text
    assert "axis_name" in text

    def bound(p, x):
        return jax.vmap(forward, (None, 0), axis_name="batch")(p, x)

    assert trace_layers(bound, params, zoo.X) == (zoo.layer("w"),)


def test_spectral_norm_of_equinox():
    """Its power iteration stops gradients, and its state is an input."""
    import equinox as eqx

    def make(key):
        linear = eqx.nn.Linear(8, 4, key=key)
        spectral = eqx.nn.make_with_state(eqx.nn.SpectralNorm)
        return spectral(linear, "weight", key=key)

    model, state = eqx.filter_eval_shape(make, jax.random.key(0))
    found = trace_layers(lambda m, s, x: m(x, s), model, state, zoo.array(8))
    expected = Layer("layer/weight", zoo.TRANSPOSED, ("layer/bias",))
    assert found == (expected,)
