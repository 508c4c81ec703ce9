"""Checks of what the user gives."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np


def check_int(name: str, value: Any, *, at_least: int) -> None:
    """Raise ValueError unless the value is an int of this size."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < at_least:
        msg = f"{name} must be an int >= {at_least}, got {name} = {value!r}."
        raise ValueError(msg)


def check_number(
    name: str,
    value: Any,
    *,
    at_least: int | float = -math.inf,
    above: int | float = -math.inf,
    below: int | float = math.inf,
) -> None:
    """Raise ValueError unless the value is a finite number in this range."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    inside = number and math.isfinite(value) and above < value < below
    if not inside or value < at_least:
        bound = f"> {above}" if above > -math.inf else f">= {at_least}"
        bound += f" and < {below}" if below < math.inf else ""
        msg = f"{name} must be a finite number {bound}, got {name} = {value!r}."
        raise ValueError(msg)


def check_function(name: str, value: Any, *, kind: str = "a function") -> None:
    """Raise ValueError unless the value can be called."""
    if not callable(value):
        msg = f"{name} must be {kind}, got {value!r}."
        raise ValueError(msg)


@contextlib.contextmanager
def optional(extra: str) -> Iterator[None]:
    """Name the extra to install, where an import in the block fails.

    Raises:
        ModuleNotFoundError: if a module is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        msg = f"{error.name} is not installed: pip install 'tb-optax[{extra}]'."
        raise ModuleNotFoundError(msg, name=error.name) from None
