"""Short texts for parameters and layers, as the tables of models write them.

Parameters are names and shapes: `"w 8x6, b c 6, scale ()"`.

Layers come in order of execution: `"conv/kernel:ppio<.bias,norm/ blocks/w[0]:sio o"`.
After the colon stands one letter for each axis of the kernel: `i` for an input, `o` for
an output, `p` for a position that is pooled, `s` for a stack; without it a kernel is
`io`.  `[0]` is a slice of a stack and `{8:16}` a part of the last axis.  After `<` come
the followers: `.bias` is in the module of its kernel, `norm/` is `norm/bias` and
`norm/scale`.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from tb_optax import Layer, MatrixAxes


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def shape(text: str) -> tuple[int, ...]:
    """Read `"8x6"`; a number has the shape `"()"`."""
    return () if text == "()" else tuple(map(int, text.split("x")))


def arrays(tree: Any) -> Any:
    """Abstract parameters of a text, or of a tree of texts."""
    if isinstance(tree, str) and not re.match(r"[\dx]+$|\(\)$", tree):
        groups = [group.split() for group in tree.split(", ")]
        tree = {name: sizes for *names, sizes in groups for name in names}
    return jax.tree.map(lambda x: array(*shape(x)) if isinstance(x, str) else x, tree)


def axes(text: str) -> MatrixAxes:
    """Read one letter for each axis."""
    fields = [
        tuple(i for i, own in enumerate(text) if own == letter) for letter in "iops"
    ]
    return MatrixAxes(*fields)


DENSE, CONV, STACK = axes("io"), axes("ppio"), axes("sio")

_LAYER = re.compile(
    r"(?P<path>[^\[{:<]+)(\[(?P<index>[\d,]+)\])?(\{(?P<part>\d+:\d+)\})?"
    r"(:(?P<axes>[iops]+))?(<(?P<follows>.+))?"
)


def layers(text: str) -> tuple[Layer, ...]:
    """Read a list of layers; the followers of each are sorted."""
    found = []
    for entry in text.split():
        match = _LAYER.fullmatch(entry)
        assert match, entry
        own, path = match.groupdict(), match["path"]
        module = re.sub(r"[^/]*$" if "/" in path else r"[^.]*$", "", path)
        follows = []
        for name in (own["follows"] or "").split(","):
            if name.endswith("/"):
                follows += [f"{name}bias", f"{name}scale"]
            elif name:
                follows.append(module + name[1:] if name[0] == "." else name)
        read = axes(own["axes"] or "io")
        index = tuple(map(int, own["index"].split(","))) if own["index"] else ()
        part = None
        if own["part"]:
            start, stop = map(int, own["part"].split(":"))
            part = (read.rank - 1, start, stop)
        found.append(Layer(path, read, tuple(sorted(follows)), index, part))
    return tuple(found)


def in_any_order(found: Iterable[Layer]) -> tuple[Layer, ...]:
    """Sort the followers of each layer, whose order says nothing."""
    return tuple(
        Layer(own.path, own.axes, tuple(sorted(own.follows)), own.index, own.part)
        for own in found
    )


def each(names: int | Iterable[str], text: str) -> str:
    """Repeat a list of layers with `#` replaced by each name, or by 0, 1, ..."""
    names = map(str, range(names)) if isinstance(names, int) else names
    return " ".join(text.replace("#", name) for name in names)
