"""How results are written: cells, tables of Markdown, and a page of HTML."""

import base64
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from benchmarks.timing import ratios

Row = dict[str, Any]

MEGABYTE = 10**6

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto;
       padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; }
th, td { padding: 0.25em 0.8em; text-align: left !important; }
th { border-bottom: 2px solid #888; }
tr:nth-child(even) { background: #f4f4f4; }
img { width: 100%; }
details { margin: 1em 0; }
summary { font-weight: bold; cursor: pointer; }
"""


def head(title: str, results: Mapping[str, Any]) -> Iterator[str]:
    """Give heading, hardware, threads, versions and command of a measurement."""
    hardware, threads = results["hardware"], results["threads"]
    yield f"## {title}: {hardware['device']} ({hardware['platform']})"
    host = f"{hardware['processor']}, {hardware['cores']} cores"
    named = ", ".join(f"{name}={value}" for name, value in threads.items())
    yield (
        f"Host: {host}, {named or 'default threads'}; "
        f"load before: {hardware['load_before']}. {listed(results['versions'])}."
    )
    yield f"```bash\n{results['command']}\n```"


def listed(numbers: Mapping[str, Any]) -> str:
    """Return names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in numbers.items())


def against(what: str, samples: Sequence[float], bound: float | None) -> Row:
    """Return a row of samples next to the bound that their median should keep."""
    row = {"what": what, "measured": cell(samples), "samples": len(samples)}
    row |= {"at most": "", "met": ""}
    if bound is not None:
        met = "yes" if np.median(samples) <= bound else "**no**"
        row |= {"at most": f"{bound:g}", "met": met}
    return row


def cell(samples: Sequence[float]) -> str:
    """Return median, lowest and highest; one number where they are equal."""
    median, low, high = float(np.median(samples)), min(samples), max(samples)
    if low == high:
        return number(median)
    return f"{number(median)} [{number(low)}, {number(high)}]"


def ratio_cell(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> str:
    """Return a cell of one way's samples over another's, round by round."""
    return cell(ratios(seconds[name], seconds[other]))


def megabytes(size: float) -> str:
    """Return a number of bytes in megabytes."""
    return number(size / MEGABYTE)


def number(value: float) -> str:
    """Return three digits, or the whole part where that is longer."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def mean_cell(samples: pd.Series, form: str) -> str:
    """Return the mean of samples, and their deviation if there are several."""
    samples = samples.dropna()
    if samples.empty:
        return ""
    mean = form.format(samples.mean())
    return mean if len(samples) == 1 else f"{mean} ± {form.format(samples.std())}"


def paired(one: pd.Series, other: pd.Series, form: str, *, ratio: bool = False) -> str:
    """Return the mean difference (or ratio) of equal seeds, and its interval."""
    pairs = (one / other if ratio else one - other).dropna()
    if len(pairs) < 2:
        return "" if pairs.empty else form.format(pairs.mean())
    mean, margin = interval(pairs)
    low, high = form.format(mean - margin), form.format(mean + margin)
    return f"{form.format(mean)} [{low}, {high}]"


def interval(samples: pd.Series) -> tuple[float, float]:
    """Return the mean of two or more samples, and half its interval of 95 %.

    The interval is by Student's t: mean ± t(0.975, n - 1) * deviation / sqrt(n).

    References:
        Student, `The Probable Error of a Mean <https://doi.org/10.2307/2331554>`_, 1908
    """
    margin = stats.t.ppf(0.975, len(samples) - 1) * stats.sem(samples)
    return float(samples.mean()), float(margin)


def table(rows: Iterable[Mapping[str, object]], form: str = "github") -> str:
    """Return rows as a table; the columns are those of the first."""
    return tabulate(list(rows), headers="keys", tablefmt=form, disable_numparse=True)


def page(
    title: str,
    about: str,
    sections: Sequence[tuple[str, Iterable[Mapping[str, object]]]],
    pictures: Sequence[Path],
) -> str:
    """Return a page of HTML, which needs no other file.

    It shows the first table, a paragraph about it, the pictures (PNG files), and the
    other tables folded.
    """
    (heading, rows), *others = sections or [("Nothing is finished yet", [])]
    parts = [f"<h1>{html.escape(title)}</h1>", f"<h2>{html.escape(heading)}</h2>"]
    parts += [table(rows, "html"), f"<p>{html.escape(about)}</p>"]
    for picture in pictures:
        content = base64.b64encode(picture.read_bytes()).decode()
        source = f"data:image/png;base64,{content}"
        parts.append(f'<img alt="{html.escape(picture.stem)}" src="{source}">')
    for heading, rows in others:
        summary = f"<summary>{html.escape(heading)}</summary>"
        parts.append(f"<details>{summary}{table(rows, 'html')}</details>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
