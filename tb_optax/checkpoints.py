"""Checkpoint files of any framework, read one leaf at a time and never unpickled.

The headers of safetensors and Flax files are parsed here, since the libraries for them
map or load whole files: memory holds one leaf, whatever the size of the model.

References:
    `The safetensors format <https://github.com/huggingface/safetensors#format>`_

    `The MessagePack format <https://github.com/msgpack/msgpack/blob/master/spec.md>`_
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import operator
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from tb_optax.checks import optional
from tb_optax.leaves import listing, path_of

__all__ = ["Checkpoint", "CheckpointError", "StoredLeaf", "open_checkpoint"]


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint; its message is one line."""


class StoredLeaf(NamedTuple):
    """A leaf of a checkpoint, not read yet.

    Attributes:
        shape: its shape.
        dtype: its dtype; None for what is no array.
        problem: why it cannot be read; empty if it can.
        load: reads it.
        load_slice: reads what an index of its first axes selects, and nothing else;
            None where a file holds no leaf in this order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | None
    problem: str
    load: Callable[[], Shaped[np.ndarray, "..."]]
    load_slice: Callable[[tuple[int, ...]], Shaped[np.ndarray, "..."]] | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose leaves are read when they are asked for.

    Attributes:
        path: the file or directory that is read.
        leaves: what is stored, by name.
    """

    path: Path
    leaves: Mapping[str, StoredLeaf]

    def read(self, name: str, index: tuple[int, ...] = ()) -> Shaped[np.ndarray, "..."]:
        """Read one leaf, or a slice of it, in the dtype that it is stored in.

        Args:
            name: one of `leaves`.
            index: of its first axes, none of them negative; () reads all.

        Raises:
            CheckpointError: if it is not there, or cannot be read.
        """
        if name not in self.leaves:
            msg = f"{self.path} has no leaf {name!r}; it has {listing(self.leaves)}."
            raise CheckpointError(msg)
        leaf = self.leaves[name]
        if leaf.problem:
            msg = f"{self.path}: {name!r} cannot be read: {leaf.problem}."
            raise CheckpointError(msg)
        with _one_line(self.path, f"leaf {name!r}"):
            if not index:
                return leaf.load()
            if leaf.load_slice is not None:
                return leaf.load_slice(index)
            return np.asarray(leaf.load()[index])

    @functools.cached_property
    def names(self) -> Mapping[str, str]:
        """Names in the file, by the paths of `shapes`, without the `value` of boxes."""
        bare = {name: name.removesuffix("/value") for name in self.leaves}
        unique = len(set(bare.values())) == len(bare)
        return {path if unique else name: name for name, path in bare.items()}

    def shapes(self) -> dict[str, Any]:
        """Return the tree of `jax.ShapeDtypeStruct` that the names describe.

        Names with slashes become nested dicts, as Flax and Haiku nest modules; other
        names stay the keys of one flat dict. What is no array is None.

        >>> leaf = StoredLeaf((4, 2), np.dtype("float16"), "", lambda: np.ones((4, 2)))
        >>> Checkpoint(Path("a.npz"), {"Dense_0/kernel": leaf}).shapes()
        {'Dense_0': {'kernel': ShapeDtypeStruct(shape=(4, 2), dtype=float16)}}
        """
        flat = {path: _abstract(self.leaves[name]) for path, name in self.names.items()}
        nested: dict[str, Any] = {}
        for path, value in flat.items():
            *around, last = path.split("/")
            node = nested
            for key in around:
                node = node.setdefault(key, {}) if isinstance(node, dict) else None
            if not isinstance(node, dict) or last in node:
                return flat  # A leaf has the name of a module: nothing is nested.
            node[last] = value
        return nested


def _abstract(leaf: StoredLeaf) -> jax.ShapeDtypeStruct | None:
    if leaf.problem or leaf.dtype is None:
        return None
    try:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    except TypeError:  # Strings and records: NumPy has them, JAX does not.
        return None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: read what is stored, but no numbers.

    | what | told by |
    |---|---|
    | safetensors, one file | `.safetensors` |
    | safetensors in shards | `.safetensors.index.json` |
    | NumPy | `.npz`; a type of two opaque bytes, `V2`, is read as bfloat16 |
    | Flax | `.msgpack` |
    | Orbax | a directory with `_METADATA` |

    A directory that holds exactly one of these stands for it.

    Args:
        path: a file or directory.

    Raises:
        CheckpointError: if it is absent, damaged, truncated or of another format.
        ModuleNotFoundError: if an Orbax directory is given and Orbax is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     file = Path(directory, "model.npz")
    ...     np.savez(file, kernel=np.ones((4, 2), np.float32))
    ...     checkpoint = open_checkpoint(file)
    ...     print(checkpoint.leaves["kernel"].shape, checkpoint.read("kernel").sum())
    (4, 2) 8.0
    """
    path = Path(path)
    if not path.exists():
        msg = f"{path} does not exist."
        raise CheckpointError(msg)
    if path.is_dir() and not (path / "_METADATA").exists():
        return open_checkpoint(_only_one_in(path))
    readers = [r for suffix, r in _READERS.items() if path.name.endswith(suffix)]
    if not readers and not path.is_dir():
        raise CheckpointError(_unknown(path))
    read = _read_orbax if path.is_dir() else readers[0]
    with _one_line(path):
        leaves = read(path)
    if not leaves:
        msg = f"{path} holds no leaf."
        raise CheckpointError(msg)
    return Checkpoint(path, types.MappingProxyType(leaves))


@contextlib.contextmanager
def _one_line(path: Path, what: str = "") -> Iterator[None]:
    """Turn whatever a parser raises on foreign bytes into one line."""
    try:
        yield
    except (CheckpointError, ModuleNotFoundError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, MemoryError):
            said = "it does not fit into memory"
        elif not isinstance(error, OSError):
            said = f"it is damaged, cut short or of another format: {said}"
        msg = f"{path}: {f'{what}: ' if what else ''}{said}"
        raise CheckpointError(msg) from error


def _check(holds: bool, message: str) -> None:
    """Raise ValueError unless something holds that a format demands."""
    if not holds:
        raise ValueError(message)


def _unknown(path: Path) -> str:
    known = ", ".join(_READERS)
    if path.suffix in (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"):
        return (
            f"{path} is a pickle by its name, which can run any code when it is read; "
            f"save it as safetensors and give that file."
        )
    return f"{path} is no checkpoint that can be read: its name must end in {known}."


def _only_one_in(directory: Path) -> Path:
    """Return the one checkpoint in a directory."""
    shards = sorted(directory.glob("*.safetensors.index.json"))
    found = shards or sorted(directory.glob("*.safetensors"))
    for suffix in (".npz", ".msgpack"):
        found += sorted(directory.glob(f"*{suffix}"))
    for pattern in ("*/_METADATA", "*/*/_METADATA"):
        found += [path.parent for path in sorted(directory.glob(pattern))]
    if len(found) == 1:
        return found[0]
    names = [str(path.relative_to(directory)) for path in found]
    msg = (
        f"{directory} holds {len(found)} checkpoints; give one of {listing(names)}."
        if found
        else f"{directory} holds no checkpoint: no {', '.join(_READERS)}, no _METADATA."
    )
    raise CheckpointError(msg)


# --- numbers at known places of a file ------------------------------------------------


class Piece(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    start: int
    stop: int


def _raw_leaf(
    path: Path, shape: Sequence[Any], dtype: np.dtype, pieces: Sequence[Piece]
) -> StoredLeaf:
    """Return a leaf whose numbers lie in these pieces of a file, one after another."""
    shape = tuple(map(operator.index, shape))
    _check(min(shape, default=0) >= 0, f"the shape {shape} is negative")
    size = sum(piece.stop - piece.start for piece in pieces)
    fits = math.prod(shape) * dtype.itemsize == size
    _check(fits, f"shape {shape} of {dtype} does not take {size} bytes")
    problem = "it holds Python objects, never unpickled" if dtype.hasobject else ""
    load = functools.partial(_read_pieces, path, shape, dtype, pieces)
    return StoredLeaf(shape, dtype, problem, load, load)


def _read_pieces(path, shape, dtype, pieces, index=()):
    array, before = _room(shape, dtype, index)
    target = array.reshape(-1).view(np.uint8).data
    with path.open("rb") as file:
        for piece in pieces:
            skipped = min(before, piece.stop - piece.start)
            before -= skipped
            file.seek(piece.start + skipped)
            length = min(piece.stop - piece.start - skipped, len(target))
            _check(file.readinto(target[:length]) == length, "the file ends early")
            target = target[length:]
    return array


def _room(shape, dtype, index) -> tuple[np.ndarray, int]:
    """Return an array for a slice, and how many bytes of the leaf lie before it."""
    array = np.empty(shape[len(index) :], dtype)
    place = np.ravel_multi_index(index, shape[: len(index)]) if index else 0
    return array, int(place) * array.nbytes


def _no_array(shape: tuple[int, ...], problem: str) -> StoredLeaf:
    return StoredLeaf(shape, None, problem, functools.partial(np.zeros, 0))


# --- safetensors ----------------------------------------------------------------------

_SAFETENSORS = {
    "BOOL": np.bool_,
    "BF16": jnp.bfloat16,
    "C64": np.complex64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
}
# The longest header that the specification allows, in bytes.
_MOST_HEADER = 10**8


def _read_safetensors(path: Path) -> dict[str, StoredLeaf]:
    """Read the header: its length in 8 bytes, then JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        fits = 2 <= length <= min(size - 8, _MOST_HEADER)
        _check(fits, f"its header of {length} bytes does not fit into {size}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    leaves = {}
    for name, entry in header.items():
        start, stop = (8 + length + operator.index(n) for n in entry["data_offsets"])
        inside = 8 + length <= start <= stop <= size
        _check(inside, f"{name!r} lies at bytes {start} to {stop} of {size}")
        dtype = _SAFETENSORS.get(entry["dtype"])
        if dtype is None:
            problem = f"its type {entry['dtype']} is unknown"
            leaves[name] = _no_array(tuple(entry["shape"]), problem)
        else:
            pieces = [Piece(start, stop)]
            leaves[name] = _raw_leaf(path, entry["shape"], np.dtype(dtype), pieces)
    return leaves


def _read_shards(path: Path) -> dict[str, StoredLeaf]:
    """Read the headers of all files of an index."""
    place = json.loads(path.read_bytes())["weight_map"]
    leaves: dict[str, StoredLeaf] = {}
    for shard in sorted(set(place.values())):
        beside = Path(shard).name == shard and shard.endswith(".safetensors")
        _check(beside, f"the shard {shard!r} is no safetensors file next to its index")
        found = open_checkpoint(path.parent / shard).leaves
        twice = found.keys() & leaves.keys()
        _check(not twice, f"two shards hold {listing(sorted(twice))}")
        leaves |= found
    missing = place.keys() - leaves.keys()
    _check(not missing, f"no shard holds {listing(sorted(missing))}")
    return leaves


# --- NumPy ----------------------------------------------------------------------------

_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _read_npz(path: Path) -> dict[str, StoredLeaf]:
    """Read the header of every member."""
    leaves = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            _check(name != info.filename, f"its member {name!r} is no array of NumPy")
            _check(name not in leaves, f"two leaves are called {name!r}")
            with archive.open(info) as member:
                leaves[name] = _npy_leaf(path, info, member)
    return leaves


def _npy_leaf(path: Path, info: zipfile.ZipInfo, member) -> StoredLeaf:
    read_header = _NPY_HEADERS[np.lib.format.read_magic(member)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That Python 2 wrote the header.
        shape, is_fortran, dtype = read_header(member)
    if dtype.hasobject:
        return _no_array(shape, "it holds Python objects, which are never unpickled")
    start = member.tell()
    size = info.file_size - start
    fits = min(shape, default=0) >= 0 and math.prod(shape) * dtype.itemsize == size
    place = f"{info.filename!r}: shape {shape} of {dtype}"
    _check(fits, f"{place} does not take {size} bytes")
    if dtype == np.dtype("V2"):  # What NumPy makes of bfloat16, which it does not know.
        dtype = np.dtype(jnp.bfloat16)
    if is_fortran:
        turned = (path, info.filename, start, shape[::-1], dtype)
        return StoredLeaf(shape, dtype, "", lambda: _read_member(*turned).T)
    load = functools.partial(_read_member, path, info.filename, start, shape, dtype)
    return StoredLeaf(shape, dtype, "", load, load)


def _read_member(path, filename, start, shape, dtype, index=()):
    array, before = _room(shape, dtype, index)
    target = array.reshape(-1).view(np.uint8).data
    with zipfile.ZipFile(path) as archive, archive.open(filename) as stream:
        member: Any = stream  # Its type lacks `readinto`.
        if index:
            member.seek(start + before)
        else:
            member.read(start)  # A seek would leave the checksum out.
        _check(member.readinto(target) == len(target), "the file ends early")
    return array


# --- Flax: MessagePack ----------------------------------------------------------------

# First and last byte of each form of a value, its kind, and the width of what follows,
# its length or the number itself: from this many bytes on, twice as many with each next
# byte. 0 says that the first byte holds it.
_MSGPACK = (
    (0x00, 0x7F, "plain", 0),
    (0x80, 0x8F, "map", 0),
    (0x90, 0x9F, "array", 0),
    (0xA0, 0xBF, "bytes", 0),
    (0xC0, 0xC0, "plain", 0),
    (0xC2, 0xC3, "plain", 0),
    (0xC4, 0xC6, "bytes", 1),
    (0xC7, 0xC9, "ext", 1),
    (0xCA, 0xCB, "plain", 4),
    (0xCC, 0xCF, "plain", 1),
    (0xD0, 0xD3, "plain", 1),
    (0xD4, 0xD8, "ext", 0),
    (0xD9, 0xDB, "bytes", 1),
    (0xDC, 0xDD, "array", 2),
    (0xDE, 0xDF, "map", 2),
    (0xE0, 0xFF, "plain", 0),
)
# Flax's type of an array: shape, name of the dtype and numbers.
_NDARRAY = 1
_CHUNKED = "__msgpack_chunked_array__"


class Head(NamedTuple):
    """The head of a value: `ext`, `map`, `array` or `bytes` and its size, or itself."""

    kind: str
    value: int
    code: int = 0


def _take(file: io.BufferedReader, size: int) -> bytes:
    taken = file.read(size)
    _check(len(taken) == size, "the file ends early")
    return taken


def _head(file: io.BufferedReader) -> Head:
    """Read the head of the next value."""
    (byte,) = _take(file, 1)
    for first, last, kind, width in _MSGPACK:
        if first <= byte <= last:
            value = byte - first
            if width:
                value = int.from_bytes(_take(file, width << value), "big")
            elif kind == "ext":
                value = 2**value
            return Head(kind, value, _take(file, 1)[0] if kind == "ext" else 0)
    msg = f"byte {byte:#x} at {file.tell() - 1} starts no value"
    raise ValueError(msg)


def _bytes(file: io.BufferedReader) -> bytes:
    head = _head(file)
    is_name = head.kind == "bytes" and head.value <= 2**16
    _check(is_name, f"a name is expected at byte {file.tell()}, not {head.kind}")
    return _take(file, head.value)


def _read_msgpack(path: Path) -> dict[str, StoredLeaf]:
    """Read names and places of all arrays of a Flax file."""
    size, found = path.stat().st_size, {}
    with path.open("rb") as file:
        _check(_head(file).kind == "map", "it does not start with a dict")
        file.seek(0)
        _walk(file, path, (), found)
        _check(file.tell() == size, f"it ends at byte {file.tell()} of {size}")
    for marker in [name for name in found if name.endswith(f"/{_CHUNKED}")]:
        _join_chunks(path, marker.removesuffix(f"/{_CHUNKED}"), found)
    plain = _no_array((), "it is no array")
    return {
        name: leaf if isinstance(leaf, StoredLeaf) else plain
        for name, leaf in found.items()
    }


def _walk(file, path: Path, names: tuple[str, ...], found: dict[str, Any]) -> None:
    """Walk over the next value, and note its arrays, or itself where it is plain."""
    head = _head(file)
    if head.kind in ("map", "array"):
        for i in range(head.value):
            name = _bytes(file).decode() if head.kind == "map" else str(i)
            _walk(file, path, (*names, name), found)
        return
    name = "/".join(names)
    _check(name not in found, f"two leaves are called {name!r}")
    found[name] = head.value
    if head.kind in ("bytes", "ext"):
        stop = file.tell() + head.value
        if head.kind == "ext" and head.code == _NDARRAY:
            found[name] = _ndarray(file, path, stop)
        file.seek(0, io.SEEK_END)
        inside = stop <= file.tell()
        _check(inside, f"{name!r} ends at byte {stop} of {file.tell()}")
        file.seek(stop)


def _ndarray(file, path: Path, stop: int) -> StoredLeaf:
    outer, inner = _head(file), _head(file)
    is_array = (outer.kind, outer.value, inner.kind) == ("array", 3, "array")
    _check(is_array, f"no array of Flax ends at byte {stop}")
    shape = [_head(file).value for _ in range(min(inner.value, 64))]
    dtype = np.dtype(_bytes(file).decode())
    numbers = _head(file)
    fits = numbers.kind == "bytes" and file.tell() + numbers.value == stop
    _check(fits, f"the numbers of an array do not end at byte {stop}")
    return _raw_leaf(path, shape, dtype, [Piece(file.tell(), stop)])


def _join_chunks(path: Path, name: str, found: dict[str, Any]) -> None:
    """Replace what Flax cuts an array of more than 1 GiB into by one leaf."""
    del found[f"{name}/{_CHUNKED}"]
    parts = []
    for part in ("shape", "chunks"):
        keys = [key for key in found if key.startswith(f"{name}/{part}/")]
        keys.sort(key=lambda key: int(key.rpartition("/")[2]))
        parts.append([found.pop(key) for key in keys])
    shape, chunks = parts
    pieces = [piece for chunk in chunks for piece in chunk.load.args[-1]]
    found[name] = _raw_leaf(path, shape, chunks[0].dtype, pieces)


# --- Orbax ----------------------------------------------------------------------------


def _read_orbax(path: Path) -> dict[str, StoredLeaf]:
    """Read the metadata of an Orbax directory."""
    with optional("files"):
        import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path.absolute()).item_metadata
    tree = getattr(metadata, "tree", metadata)
    flat, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: hasattr(node, "shape")
    )
    leaves = {}
    for position, (keys, leaf) in enumerate(flat):
        if getattr(leaf, "shape", None) is None or leaf.dtype is None:
            leaves[path_of(keys)] = _no_array((), "it is no array")
            continue
        load = functools.partial(_restore, path, structure, position)
        dtype = np.dtype(leaf.dtype)
        leaves[path_of(keys)] = StoredLeaf(tuple(leaf.shape), dtype, "", load)
    return leaves


def _restore(path, structure, position):
    """Restore one leaf; placeholders stand for the others."""
    import orbax.checkpoint as ocp

    marks = [ocp.PLACEHOLDER] * structure.num_leaves
    how = [ocp.RestoreArgs(restore_type=np.ndarray)] * structure.num_leaves
    marks[position] = 0
    with ocp.PyTreeCheckpointer() as checkpointer:
        item, args = (jax.tree.unflatten(structure, leaves) for leaves in (marks, how))
        restored = checkpointer.restore(
            path.absolute(), args=ocp.args.PyTreeRestore(item, restore_args=args)
        )
    return np.asarray(jax.tree.leaves(restored)[position])


_READERS: dict[str, Callable[[Path], dict[str, StoredLeaf]]] = {
    ".safetensors": _read_safetensors,
    ".safetensors.index.json": _read_shards,
    ".npz": _read_npz,
    ".msgpack": _read_msgpack,
}
