"""The newest state of each arm, written by Orbax.

A checkpoint is a directory named by the epochs behind it.  It gets this name once it
is complete, with the digests of its files inside, so that neither a kill nor a
damaged file can pass for a state.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import orbax.checkpoint as ocp

from benchmarks.errors import UserError, first_line
from benchmarks.loop import TrainState

_DIGESTS = "sha256.json"
_STATE = "state"


class Checkpoints:
    """The checkpoints of one arm."""

    def __init__(self, checkpointer: ocp.StandardCheckpointer, path: Path):
        self._checkpointer = checkpointer
        self._path = path

    def save(self, epochs: int, state: TrainState) -> None:
        """Write a state; older ones go once it is complete."""
        partial = self._path / f"{epochs}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self._checkpointer.save((partial / _STATE).absolute(), state)
        self._checkpointer.wait_until_finished()
        (partial / _DIGESTS).write_text(json.dumps(_digests(partial / _STATE)))
        older = _finished(self._path)
        os.replace(partial, self._path / str(epochs))
        for number in older:
            shutil.rmtree(self._path / str(number))

    def restore(self, abstract: TrainState) -> TrainState:
        """Read the newest state into the structure and placement of `abstract`."""
        path = self._path / str(newest(self._path))
        try:
            # Orbax reports damage in many ways, not all of them exceptions.
            if json.loads((path / _DIGESTS).read_bytes()) != _digests(path / _STATE):
                msg = f"its files do not have the digests of {_DIGESTS}"
                raise ValueError(msg)
            return self._checkpointer.restore((path / _STATE).absolute(), abstract)
        except Exception as error:  # Orbax and its storage raise many types.
            msg = (
                f"the checkpoint {path} cannot be restored ({first_line(error)}); "
                "give another --out"
            )
            raise UserError(msg) from error


@contextlib.contextmanager
def open_checkpoints(path: Path) -> Generator[Checkpoints, None, None]:
    """Open the directory of one arm; it appears with the first checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        yield Checkpoints(checkpointer, path)


def newest(path: Path) -> int:
    """Return the epochs behind the newest checkpoint of an arm; 0 without any."""
    return max(_finished(path), default=0)


def _finished(path: Path) -> list[int]:
    if not path.exists():
        return []
    return [int(entry.name) for entry in path.iterdir() if entry.name.isdecimal()]


def _digests(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }
