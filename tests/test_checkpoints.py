"""Checkpoint files: what is read from good ones, and what is said of bad ones."""

import contextlib
import gc
import json
import math
import pickle
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from tb_optax.checkpoints import CheckpointError, open_checkpoint

RNG = np.random.default_rng(0)
TREE = {
    "Conv_0": {"kernel": RNG.normal(size=(3, 3, 2, 4)).astype(np.float32)},
    "Dense_0": {
        "bias": RNG.normal(size=4).astype(jnp.bfloat16),
        "kernel": RNG.normal(size=(8, 4)).astype(np.float16),
    },
    "steps": RNG.integers(0, 9, 3).astype(np.int32),
}
FLAT = {"/".join(k.key for k in keys): x for keys, x in jax.tree.leaves_with_path(TREE)}


KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}


def header_and(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file by its specification."""
    return len(header).to_bytes(8, "little") + header + data


def write_sparse(path: Path, leaves: Mapping[str, Any]) -> None:
    """Write leaves of these types, shapes and bytes; where these are none, a hole."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, (dtype, shape, _) in leaves.items():
        start, stop = stop, stop + np.dtype(dtype).itemsize * math.prod(shape)
        kind, offsets = KINDS[np.dtype(dtype).name], [start, stop]
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
    start = header_and(json.dumps(table).encode())
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + stop)
        for name, (_, _, data) in leaves.items():
            file.seek(len(start) + table[name]["data_offsets"][0])
            file.write(data)


def write_safetensors(path: Path, arrays=FLAT) -> None:
    write_sparse(path, {k: (x.dtype, x.shape, x.tobytes()) for k, x in arrays.items()})


def write_shards(path: Path) -> None:
    names = list(FLAT)
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, part in shards.items():
        write_safetensors(path.parent / file, {name: FLAT[name] for name in part})
    place = {name: file for file, part in shards.items() for name in part}
    path.write_text(json.dumps({"metadata": {}, "weight_map": place}))


def write_chunks(path: Path) -> None:
    """Flax cuts large arrays."""
    with mock.patch.object(flax.serialization, "MAX_CHUNK_SIZE", 16):
        path.write_bytes(flax.serialization.to_bytes(TREE))


def write_orbax(path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), TREE)


WRITERS = {
    "a.safetensors": write_safetensors,
    "model.safetensors.index.json": write_shards,
    "a.npz": lambda path: np.savez(path, **FLAT),
    "compressed.npz": lambda path: np.savez_compressed(path, **FLAT),
    "a.msgpack": lambda path: path.write_bytes(flax.serialization.to_bytes(TREE)),
    "chunks.msgpack": write_chunks,
    "orbax": write_orbax,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_written_is_read_bit_for_bit(name, tmp_path):
    WRITERS[name](tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    assert checkpoint.leaves.keys() == FLAT.keys()
    for leaf, written in FLAT.items():
        read = checkpoint.read(leaf)
        assert (read.shape, read.dtype) == (written.shape, written.dtype)
        assert checkpoint.leaves[leaf][:3] == (written.shape, written.dtype, "")
        assert read.tobytes() == written.tobytes()
        for axes in range(1, written.ndim + 1):
            last = tuple(size - 1 for size in written.shape[:axes])
            assert checkpoint.read(leaf, last).tobytes() == written[last].tobytes()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    assert checkpoint.shapes() == shapes
    # The only checkpoint in a directory stands for it.
    assert open_checkpoint(tmp_path).path == tmp_path / name


OTHERS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "a.safetensors": (
        lambda path, **arrays: safetensors.numpy.save_file(arrays, path),
        {"f64": np.arange(4.0), "empty": np.ones((0, 3), np.int8), "none": np.ones(())},
    ),
    "a.npz": (
        np.savez,
        {
            "fortran": np.asfortranarray(FLAT["Dense_0/kernel"]),
            "big": np.ones(3, ">f4"),
        },
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_types_and_orders(name, tmp_path):
    write, arrays = OTHERS[name]
    write(tmp_path / name, **arrays)
    checkpoint = open_checkpoint(tmp_path / name)
    for leaf, written in arrays.items():
        np.testing.assert_array_equal(checkpoint.read(leaf), written, strict=True)
        if written.size:
            index = (1,) * written.ndim
            assert checkpoint.read(leaf, index) == written[index]


def test_lists_and_numbers_of_flax(tmp_path):
    state = {"opt": [{"mu": np.ones(2)}, {}], "step": 3, "rate": 0.5, "name": "x" * 300}
    (tmp_path / "a.msgpack").write_bytes(flax.serialization.to_bytes(state))
    checkpoint = open_checkpoint(tmp_path / "a.msgpack")
    assert list(checkpoint.leaves) == ["opt/0/mu", "step", "rate", "name"]
    with pytest.raises(CheckpointError, match="'step' cannot be read: it is no array"):
        checkpoint.read("step")


def test_boxes_are_no_part_of_paths(tmp_path):
    np.savez(tmp_path / "a.npz", **{"fc/kernel/value": np.ones((4, 2))})
    checkpoint = open_checkpoint(tmp_path / "a.npz")
    assert dict(checkpoint.names) == {"fc/kernel": "fc/kernel/value"}
    assert checkpoint.shapes()["fc"]["kernel"].shape == (4, 2)


def test_names_that_do_not_nest_stay_flat(tmp_path):
    np.savez(tmp_path / "a.npz", **{"a": np.ones(1), "a/b": np.ones(1)})
    assert open_checkpoint(tmp_path / "a.npz").shapes().keys() == {"a", "a/b"}


def test_only_what_is_asked_for_is_read(tmp_path):
    """A file of 1 GB, nearly all of it one leaf of which one row is asked for."""
    path, small = tmp_path / "a.safetensors", FLAT["Dense_0/kernel"]
    large = np.float32, (2**18, 2**10), b""
    write_sparse(path, {"l": large, "s": (small.dtype, small.shape, small.tobytes())})
    tracemalloc.start()
    try:
        assert open_checkpoint(path).read("s").tobytes() == small.tobytes()
        assert not open_checkpoint(path).read("l", (2**17,)).any()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# --- what is wrong ------------------------------------------------------------------


class Trap:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.ones((2, 2)), trap=np.asarray([Trap()], object))
    checkpoint = open_checkpoint(tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match=r"'trap' cannot be read.*unpickled"):
        checkpoint.read("trap")
    assert checkpoint.shapes()["trap"] is None
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="is a pickle by its name"):
        open_checkpoint(tmp_path / "model.pt")


BAD_FILES = {
    "a.safetensors": [
        (b"", "header of 0 bytes"),
        (b"\x10", "header of 16 bytes"),
        (b"PK\x03\x04" + bytes(60), "does not fit into 64"),
        (b"\xff" * 8 + b"{}", "does not fit into 10"),
        ((4).to_bytes(8, "little") + b"true", "damaged"),
        ((2).to_bytes(8, "little") + b"{}", "holds no leaf"),
    ],
    "a.npz": [
        (b"", "not a zip"),
        (b"PK\x03\x04", "not a zip"),
        (b"x" * 99, "not a zip"),
    ],
    "a.msgpack": [
        (b"", "ends early"),
        (b"\x05", "does not start with a dict"),
        (b"\x81\xa1w", "ends early"),
        (b"\x81\xa1w\xc1", "byte 0xc1 at 3 starts no value"),
        (b"\x81\xa1w\xc6\xff\xff\xff\xff", "'w' ends at byte"),
        (b"\x81\xa1w\xc7\x03\x01abc", "damaged"),
        (b"\x81\x05\x05", "a name is expected"),
        (b"\x81\xa1w\x05\x05", "ends at byte 4 of 5"),
        (b"\x81\xa1w" * 5000 + b"\x05", "damaged"),
        (b"\x82\xa1w\x05\xa1w\x05", "two leaves are called 'w'"),
        (b"\xdf\xff\xff\xff\xff", "ends early"),
    ],
    "a.safetensors.index.json": [
        (b"{", "damaged"),
        (b"[]", "damaged"),
        (b'{"weight_map": {"w": "../a.safetensors"}}', "no safetensors file next to"),
        (b'{"weight_map": {"w": ".."}}', "no safetensors file next to its index"),
        (b'{"weight_map": {"w": "gone.safetensors"}}', "does not exist"),
    ],
    "a.txt": [(b"hello", r"its name must end in \.safetensors")],
    "a.pth": [(b"PK\x03\x04", "is a pickle by its name")],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for name, cases in BAD_FILES.items() for case in cases],
)
def test_one_line_says_what_is_wrong(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def lying(**entry):
    """A file of one leaf of 8 bytes, with a fault in its header."""
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    return header_and(json.dumps({"w": whole}).encode(), bytes(8))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data_offsets": [0, 9]}, "bytes .* of"),
        ({"data_offsets": [8, 0]}, "bytes .* of"),
        ({"data_offsets": [-8, 0]}, "bytes .* of"),
        ({"shape": [3]}, "does not take 8 bytes"),
        ({"shape": [2**62, 2**62]}, "does not take 8 bytes"),
        ({"shape": [-1, -2]}, "is negative"),
        ({"shape": ["2"]}, "damaged"),
        ({"shape": 2}, "damaged"),
    ],
)
def test_headers_that_lie(entry, message, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(lying(**entry))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_types_that_are_unknown_are_told_where_they_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(lying(dtype="F4"))
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match="its type F4 is unknown"):
        checkpoint.read("w")


def test_arrays_larger_than_memory(tmp_path):
    """Both sizes of a NumPy member agree on 2^60 numbers, and its directory lies."""
    np.savez(tmp_path / "a.npz", w=np.ones((2, 2)))
    path = tmp_path / "large.npz"
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**60},), }}"
    member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", member)
    with pytest.raises(CheckpointError, match="does not take 0 bytes"):
        open_checkpoint(path)


def test_directories(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, w=np.ones(1))
    with pytest.raises(
        CheckpointError, match=r"holds 2 .* give one of 'a.npz', 'b.npz'"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(tmp_path / "orbax")


def test_leaves_that_a_file_does_not_have(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.ones(1))
    with pytest.raises(CheckpointError, match="no leaf 'v'; it has 'w'"):
        open_checkpoint(tmp_path / "a.npz").read("v")


# Orbax leaves tasks unfinished where it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_orbax_directories(tmp_path):
    """What is left after a disk was full: every file once cut, and once gone."""
    write_orbax(tmp_path / "whole")
    errors, files = 0, [p for p in (tmp_path / "whole").rglob("*") if p.is_file()]
    for number, file in enumerate(files):
        for cut in (True, False):
            copy = tmp_path / f"{number}{cut}"
            shutil.copytree(tmp_path / "whole", copy)
            place = copy / file.relative_to(tmp_path / "whole")
            place.unlink()
            if cut:
                place.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            try:
                checkpoint = open_checkpoint(copy)
                for leaf in checkpoint.leaves:
                    checkpoint.read(leaf)
            except CheckpointError as error:
                errors += "\n" not in str(error)
    gc.collect()  # While the filter stands.
    assert errors >= 4


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """Cut bytes off, change some near the start or anywhere, or add some."""
    data, kind = bytearray(whole), rng.integers(5)
    if kind == 0:
        return whole[: rng.integers(len(whole))]
    if kind == 1:
        return whole + rng.bytes(int(rng.integers(1, 20)))
    if kind == 2:
        place = int(rng.integers(len(data)))
        return bytes(data[:place] + data[place + int(rng.integers(1, 9)) :])
    where = rng.integers(0, len(data) if kind == 3 else 200, rng.integers(1, 6))
    for place in where:
        data[place] = int(rng.integers(256))
    return bytes(data)


@pytest.mark.parametrize(
    "name", ["a.safetensors", "a.npz", "compressed.npz", "a.msgpack"]
)
def test_damage_is_an_error_of_one_line_or_harmless(name, tmp_path):
    """300 files: nothing but a `CheckpointError` of one line comes out."""
    WRITERS[name](tmp_path / name)
    whole, rng, errors = (tmp_path / name).read_bytes(), np.random.default_rng(1), []
    for case in range(75):
        path = tmp_path / f"{case}-{name}"
        path.write_bytes(damaged(whole, rng))
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        checkpoint.shapes()
        for leaf in checkpoint.leaves:
            with contextlib.suppress(CheckpointError):
                checkpoint.read(leaf)
    assert len(errors) > 25
    assert not any("\n" in error for error in errors)
