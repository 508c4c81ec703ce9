"""Cells and tables of Markdown: how numbers are written."""

from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate

from benchmarks.timing import Summary, ratios, summary

Row = dict[str, str]

MEGABYTE = 10**6


def cells(seconds: Mapping[str, Sequence[float]]) -> Row:
    """Return a cell for each way of doing something."""
    return {name: cell(samples) for name, samples in seconds.items()}


def ratio_cell(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> str:
    """Return a cell of one way's samples over another's, round by round."""
    return cell(ratios(seconds[name], seconds[other]))


def cell(samples: Sequence[float]) -> str:
    """Return median, lowest and highest of samples."""
    return spread_cell(summary(samples))


def spread_cell(figure: Summary) -> str:
    """Return median, lowest and highest; one number where they are equal."""
    if figure.low == figure.high:
        return number(figure.median)
    return f"{number(figure.median)} [{number(figure.low)}, {number(figure.high)}]"


def number(value: float) -> str:
    """Return three digits, or the whole part where that is longer."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def megabytes(size: float) -> str:
    """Return a number of bytes in megabytes."""
    return number(size / MEGABYTE)


def table(rows: Iterable[Mapping[str, object]]) -> str:
    """Return rows as a table; the columns are those of the first."""
    return tabulate(
        list(rows), headers="keys", tablefmt="github", disable_numparse=True
    )
