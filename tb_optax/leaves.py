"""Leaves of a parameter tree by path, whatever framework made it; patterns on paths."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

T = TypeVar("T")


class Leaf(NamedTuple):
    """A leaf with its path, taken apart.

    Attributes:
        path: the whole path, unique in its tree.
        module: the names above the leaf's own; a dict key with dots is several names.
        name: the leaf's own name.
        attribute: whether that name is an attribute that holds the bare array, as in
            Equinox modules.
        value: the leaf; None where a mask or None stands.
        owner: the object that holds the leaf or its box, where that is an attribute.
    """

    path: str
    module: tuple[str, ...]
    name: str
    attribute: bool
    value: Any
    owner: Any

    @property
    def is_array(self) -> bool:
        """Whether the leaf is an array, concrete or abstract."""
        return is_array(self.value)

    @property
    def dotted(self) -> bool:
        """Whether the leaf's own name is the last of a key with dots, as in PyTorch."""
        return bool(self.module) and self.path.endswith(f".{self.name}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an array; empty for anything else."""
        return tuple(self.value.shape) if self.is_array else ()


def is_array(value: Any) -> bool:
    """Whether a leaf has a shape and a dtype, concrete or abstract."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def leaves_of(tree: Any) -> dict[str, Leaf]:
    """Return every leaf by its path; masked leaves and None have the value None.

    The final `.value` of a boxed leaf (nnx, `nn.Partitioned`) is not part of the
    path, so that the same tree has the same paths with and without its boxes.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_absent)
    leaves = {}
    for keys, value in flat:
        path = path_of(keys)
        bare = _unboxed(keys)
        boxed, keys = len(bare) < len(keys), bare
        if path in leaves:
            msg = (
                f"two leaves have the path {path!r}; a key that holds '/' can do "
                f"that: rename one of them."
            )
            raise ValueError(msg)
        names = [name for key in keys for name in _names(key)]
        named = bool(keys) and isinstance(keys[-1], jax.tree_util.GetAttrKey)
        leaves[path] = Leaf(
            path=path,
            module=tuple(names[:-1]),
            name=names[-1] if names else "",
            attribute=named and not boxed,
            value=None if _is_absent(value) else value,
            owner=_follow(tree, keys[:-1]) if named else None,
        )
    return leaves


def shapes_of(leaves: Mapping[str, Leaf]) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of every leaf by path; None for masked leaves and non-arrays."""
    return {p: leaf.shape if leaf.is_array else None for p, leaf in leaves.items()}


def path_of(keys: Sequence[Any]) -> str:
    """Return the path of a leaf as a string, without the `.value` of its box."""
    return jax.tree_util.keystr(_unboxed(keys), simple=True, separator="/")


def _names(key) -> list[str]:
    """Split a dict key at its dots, `"h.0.fc.weight"`; other keys are one name."""
    name = jax.tree_util.keystr((key,), simple=True)
    names = name.split(".") if isinstance(key, jax.tree_util.DictKey) else [name]
    return names if all(names) else [name]


def _unboxed(keys) -> tuple[Any, ...]:
    boxed = tuple(keys[-1:]) == (jax.tree_util.GetAttrKey("value"),)
    return tuple(keys[:-1] if boxed else keys)


def _is_absent(value) -> bool:
    """None, and the childless NamedTuple that `optax.masked` leaves in a tree."""
    return value is None or (
        isinstance(value, tuple) and hasattr(value, "_fields") and not value._fields
    )


def _follow(tree, keys):
    """Return the node at the end of a path; None where a key cannot be followed."""
    for key in keys:
        if isinstance(key, jax.tree_util.GetAttrKey):
            tree = getattr(tree, key.name, None)
        elif isinstance(key, jax.tree_util.DictKey):
            tree = tree[key.key]
        elif isinstance(key, jax.tree_util.SequenceKey):
            tree = tree[key.idx]
        else:
            return None
    return tree


def match_paths(
    argument: str, patterns: Mapping[str, T] | None, paths: Iterable[str]
) -> dict[str, T]:
    """Return what the first matching pattern says of each path that one matches.

    A pattern that is a path stands for this leaf alone, whatever brackets are in it.

    >>> match_paths("axes", {"a/*": 1, "*": 2}, ["a/w", "b/w"])
    {'a/w': 1, 'b/w': 2}
    """
    paths = dict.fromkeys(paths)
    patterns = dict(patterns or {})
    unused = set(patterns)
    found = {}
    for path in paths:
        matching = [
            pattern
            for pattern in patterns
            if pattern == path
            or (pattern not in paths and fnmatch.fnmatchcase(path, pattern))
        ]
        unused.difference_update(matching)
        if matching:
            found[path] = patterns[matching[0]]
    if unused:
        msg = (
            f"{argument}: no leaf matches {listing(sorted(unused))}; the paths are "
            f"{listing(paths)}."
        )
        raise ValueError(msg)
    return found


def natural(path: str) -> list[Any]:
    """Return a key that sorts numbers inside a path by value: 10 after 9."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", path)]


def listing(names: Iterable[str], limit: int = 8) -> str:
    """List names for an error message, in quotes, the first few of many."""
    names = list(names)
    listed = ", ".join(repr(name) for name in names[:limit])
    return listed + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def computing_dtype(*arrays: Any) -> np.dtype:
    """Float64 if an array has it, else float32: half precision is cast up."""
    wide = any(array.dtype == np.float64 for array in arrays)
    return np.dtype(np.float64 if wide else np.float32)
