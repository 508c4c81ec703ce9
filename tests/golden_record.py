"""Keeps what the golden tests compare, for the tables they print with `-s`."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

# Of figures of the published code run in float64, or in float32.
TOLERANCE = {"x64": 1e-9, "float32": 1e-4}


class Record:
    """What a test module has compared, for the table that `conftest` prints."""

    def __init__(self, title: str):
        self.title = title
        self._worst: dict[tuple[str, str], tuple[float, float, str]] = {}
        self._rows: collections.Counter[tuple[str, str]] = collections.Counter()
        self._excused: collections.Counter[tuple[str, str]] = collections.Counter()

    def compare(
        self,
        what: str,
        precision_name: str,
        deviation: Any,
        tolerance: Any,
        where: str | Sequence[str],
    ) -> None:
        """Notes the deviations, and asserts that none is beyond tolerance."""
        deviation = np.ravel(np.asarray(deviation, np.float64))
        tolerance = np.broadcast_to(tolerance, deviation.shape)
        places = [where] * deviation.size if isinstance(where, str) else where
        share = np.where(np.isfinite(deviation), deviation, np.inf) / tolerance
        key = (what, precision_name)
        self._rows[key] += share.size
        if share.size:
            worst = int(np.argmax(share))
            entry = (float(share[worst]), float(deviation[worst]), places[worst])
            self._worst[key] = max(self._worst.get(key, (-1.0, 0.0, "")), entry)
        beyond = [
            f"{precision_name}, {places[int(i)]}: {what} off by {deviation[i]:.3g}, "
            f"tolerance {tolerance[i]:.3g}"
            for i in np.flatnonzero(~(share <= 1))
        ]
        assert not beyond, "\n".join(beyond[:20])

    def hold(
        self,
        what: str,
        precision_name: str,
        found: Any,
        published: Any,
        where: str,
        tolerance: float | None = None,
    ) -> None:
        """Asserts that numbers agree, relatively or, below 1, absolutely."""
        published = np.asarray(published, np.float64)
        deviation = np.abs(found - published) / np.maximum(1, np.abs(published))
        tolerance = tolerance or TOLERANCE[precision_name]
        self.compare(what, precision_name, deviation, tolerance, where)

    def excuse(self, rule: str, precision_name: str) -> None:
        """Counts a row that a rule excuses."""
        self._excused[rule, precision_name] += 1

    def table(self) -> str:
        """What was compared, the largest deviations, and the excused rows."""
        lines = [f"\n{self.title}: largest deviation, of its tolerance, rows, where"]
        for (what, name), (share, deviation, where) in sorted(self._worst.items()):
            rows = self._rows[what, name]
            lines.append(
                f"  {what:<30} {name:<8} {deviation:9.2e} {share:7.1%} {rows:7d}  "
                f"{where}"
            )
        for (rule, name), rows in sorted(self._excused.items()):
            lines.append(f"  excused: {rule}, {name}: {rows} rows")
        return "\n".join(lines)
