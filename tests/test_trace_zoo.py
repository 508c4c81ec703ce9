"""`trace_layers` on programs of the kinds that it once read wrongly."""

import dataclasses
import functools
import re
from typing import Any

import pytest
from zoo import CASES, Case

from tb_optax import Layer, MatrixAxes, trace_layers


def trace(case: Case, **options: Any) -> tuple[Layer, ...]:
    """Layers of a program; given axes that a message proposes stand before its own."""
    axes = {**options.pop("axes", {}), **case.options.get("axes", {})}
    options = {**case.options, **options, **({"axes": axes} if axes else {})}
    return trace_layers(case.forward, case.params, *case.inputs, **options)


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
def test_layers(name):
    """The list that the program means; or, where that is lawful, an error."""
    case = CASES[name]
    found, error = outcome(name)
    if not error:
        assert case.layers is not None, f"an error should have named {case.named}"
        for own, expected in zip(found, case.layers, strict=True):
            follows = tuple(path for path in own.follows if path not in case.free)
            assert dataclasses.replace(own, follows=follows) == expected
        return
    assert case.named, f"raised: {error}"
    named = leaves_named(error)
    assert set(case.named) <= named, error
    assert case.says in error
    clear = {own.path for own in case.layers or ()} - set(case.named)
    assert not clear & named, f"these are clear: {clear & named}"


UNCLEAR = [name for name, case in CASES.items() if case.named]


@pytest.mark.parametrize("name", UNCLEAR)
def test_the_proposed_dict_settles_everything(name):
    """It has exactly the leaves that are named, kernels first, and can be pasted."""
    case = CASES[name]
    _, error = outcome(name)
    if not error:
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
