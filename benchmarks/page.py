"""One HTML file that shows a training: nothing is loaded from elsewhere."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

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


def page(
    title: str,
    about: str,
    sections: Sequence[tuple[str, Iterable[Mapping[str, object]]]],
    pictures: Sequence[Path],
) -> str:
    """Return a page: the first table, the pictures, and the other tables folded.

    Args:
        title: of the page.
        about: a paragraph that goes below the first table.
        sections: headings and rows of the tables.
        pictures: PNG files, which become part of the page.
    """
    (heading, rows), *others = sections
    parts = [f"<h1>{html.escape(title)}</h1>", f"<h2>{html.escape(heading)}</h2>"]
    parts += [_table(rows), f"<p>{html.escape(about)}</p>"]
    for picture in pictures:
        content = base64.b64encode(picture.read_bytes()).decode()
        source = f"data:image/png;base64,{content}"
        parts.append(f'<img alt="{html.escape(picture.stem)}" src="{source}">')
    for heading, rows in others:
        summary = f"<summary>{html.escape(heading)}</summary>"
        parts.append(f"<details>{summary}{_table(rows)}</details>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(rows: Iterable[Mapping[str, object]]) -> str:
    return tabulate(list(rows), headers="keys", tablefmt="html", disable_numparse=True)
