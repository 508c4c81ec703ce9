"""JSON files that are replaced at once, and the records of directories."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.errors import UserError, first_line

Row = dict[str, Any]

TEMPORARY = ".tmp"


def is_empty(path: Path) -> bool:
    """Return whether a directory is not there, or holds what a kill may leave only."""
    files = path.iterdir() if path.exists() else ()
    return all(file.suffix == TEMPORARY for file in files)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old one or the new one."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a kill leaves either the old one or the new one."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, **fields: type) -> Row:
    """Read a JSON object that has these fields, of these types."""
    try:
        content = json.loads(path.read_bytes())
        for name, kind in fields.items():
            if not isinstance(content[name], kind):
                raise TypeError(f"{name} is no {kind.__name__}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"({first_line(error)}); restore it, or start elsewhere"
        raise UserError(f"{path} is damaged {why}") from error
    return content


def finite(row: Mapping[str, Any]) -> Row:
    """Return a row for JSON, which has no NaN and no infinity: null stands for both."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Write a line per row so that a kill leaves either the old file or the new one."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[Row]:
    """Return the rows of a file; none if it is not there."""
    rows = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise TypeError("no object")
        except (ValueError, TypeError) as error:
            why = first_line(error)
            raise UserError(f"{path} is damaged in line {number} ({why})") from error
    return rows


def digest(path: Path) -> str:
    """Return the SHA-256 of all files below a directory."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    total = hashlib.sha256()
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(path)} {content}\n".encode())
    return total.hexdigest()


def read_record(
    file: Path, own: Mapping[str, Any], *, resume: bool, **fields: type
) -> Row:
    """Return the record of a directory, without commands if the directory is new.

    Args:
        file: the record; other files are next to it.
        own: what it must say.
        resume: whether the directory may have anything.
        fields: types of other fields.
    """
    path = file.parent
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is no directory; give another --out")
    if is_empty(path):
        return {"commands": []}
    if not resume:
        raise UserError(f"{path} is not empty; give --resume or another --out")
    if not file.exists():
        raise UserError(f"{path} holds no run: no {file.name}; give another --out")
    content = read_json(file, commands=list, **fields)
    for name, value in own.items():
        if content.get(name) != value:
            raise UserError(
                f"{path} has the {name} {content.get(name)!r}, not {value!r}; give "
                "that, or another --out"
            )
    return content


def write_record(
    file: Path, content: Row, program: str, arguments: Sequence[str]
) -> Row:
    """Add the command that trains now to a record, write it, and return it."""
    command = machine.describe(program, arguments)
    del command["hardware"]["load_before"]  # Training takes too long for it.
    if command not in content["commands"]:
        content = content | {"commands": [*content["commands"], command]}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)
    return content
