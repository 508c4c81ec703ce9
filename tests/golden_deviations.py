"""Tables of the places where the library disagrees with the published code."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import golden
import golden_record
import numpy as np

Place = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Deviation:
    """Where the library disagrees with the published code, and why.

    Attributes:
        what: which numbers, for example "alpha" or "rate".
        cases: names of the nets or vectors.
        configs: rows of the configurations.
        published: "raises", "nan", "inf" or "finite".
        ours: what the library does, in the words of the test.
        reason: why.
        precisions: where it is so.
    """

    what: str
    cases: tuple[str, ...]
    configs: frozenset[int]
    published: str
    ours: str
    reason: str
    precisions: tuple[str, ...] = golden.PRECISIONS


def listed_in(name: str) -> tuple[Deviation, ...]:
    """Read a table of deviations from `data`; rows of configurations are as "0-3,7"."""

    def rows(text: str) -> frozenset[int]:
        ends = [tuple(map(int, part.split("-"))) for part in text.split(",")]
        return frozenset(row for pair in ends for row in range(pair[0], pair[-1] + 1))

    return tuple(
        Deviation(
            **row
            | {"cases": tuple(row["cases"]), "configs": rows(row["configs"])}
            | {"precisions": tuple(row.get("precisions", golden.PRECISIONS))}
        )
        for row in json.loads((golden.DATA.parent / f"{name}.json").read_text())
    )


def where(configs: Sequence[Mapping[str, Any]], **options: Any) -> frozenset[int]:
    """The rows of the configurations with these options."""
    return frozenset(
        row
        for row, config in enumerate(configs)
        if all(config[option] == value for option, value in options.items())
    )


def state_of(values: np.ndarray, *, failed: bool) -> str:
    """What the published code gave."""
    if failed:
        return "raises"
    if np.isnan(values).any():
        return "nan"
    return "inf" if np.isinf(values).any() else "finite"


def assert_as_listed(
    deviations: Iterable[Deviation],
    what: str,
    precision_name: str,
    found: Mapping[Place, tuple[str, str]],
    record: golden_record.Record,
) -> None:
    """Holds what deviates to the table, in both directions.

    A place that is not listed must agree, and a listed one must deviate, as listed.

    Args:
        deviations: the table.
        what: which of its rows.
        precision_name: which of its rows.
        found: (case, configuration) to (published, ours) for all that deviates.
        record: counts the places.
    """
    expected = {}
    for deviation in deviations:
        if deviation.what != what or precision_name not in deviation.precisions:
            continue
        assert deviation.configs, f"nothing is meant by {deviation}"
        for case in deviation.cases:
            for row in deviation.configs:
                assert (case, row) not in expected, f"{case}, {row} is listed twice"
                expected[case, row] = deviation
    wrong = []
    for place in sorted(found.keys() | expected.keys()):
        listed = expected.get(place)
        states = listed and (listed.published, listed.ours)
        if listed is None or found.get(place) != states:
            wrong.append(f"{place}: found {found.get(place)}, listed {states}")
        else:
            record.excuse(f"{what}: {listed.reason}", precision_name)
    assert not wrong, "\n".join(wrong[:40])
