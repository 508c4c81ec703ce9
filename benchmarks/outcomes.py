"""What the runs of a comparison came to: the numbers below its tables.

Accuracies go from 0 to 1.  A run whose loss is no longer finite counts as it is.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import commandline, outcome_tables, published, records
from benchmarks.comparison import Comparison
from benchmarks.records import Row, plain
from benchmarks.selection import best_on_test, selected

Summary = dict[str, Any]

REPORT = "report.md"
SUMMARY = "summary.json"


def write(comparison: Comparison) -> None:
    """Write the summary and the report, which shows the pictures that are there."""
    summary = summarise(comparison)
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    records.replace(comparison.path / SUMMARY, text)
    pictures = sorted(path.name for path in comparison.path.glob("*.png"))
    parts = outcome_tables.section(summary, pictures)
    records.replace(comparison.path / REPORT, "\n\n".join(parts) + "\n")


def summarise(comparison: Comparison) -> Summary:
    """Return everything that the tables need, as JSON has it."""
    done = comparison.done()
    runs: list[Row] = []
    for variant, seed in comparison.places():
        directory, config = (
            comparison.directory(variant, seed),
            comparison.configs[variant],
        )
        rows = records.read(directory.metrics)
        for arm in comparison.arms:
            epochs = done[variant, arm, seed]
            run: Row = {"variant": variant, "arm": arm, "seed": seed, "epochs": epochs}
            if epochs == config.epochs:
                own = [row for row in rows if row["arm"] == arm]
                # Whole batches alone are seen.
                batches = directory.train_rows() // config.batch_size
                run |= outcome(own) | speed(own, batches * config.batch_size)
            runs.append(run)
    return {
        "name": comparison.name,
        "commands": _anywhere(comparison.commands),
        "configs": {
            variant: _without(plain(config), "arms", "seed", "data_dir")
            for variant, config in comparison.configs.items()
        },
        "settings": {
            variant: {
                arm: dataclasses.asdict(published.settings(config, arm))
                for arm in comparison.arms
            }
            for variant, config in comparison.configs.items()
        },
        "arms": list(comparison.arms),
        "seeds": list(comparison.seeds),
        "runs": runs,
    }


def outcome(rows: Sequence[Row]) -> Row:
    """Return the test accuracies of a run, and where its loss was no longer finite.

    Args:
        rows: of `metrics.jsonl`, one per epoch.

    Returns:
        `last`, `best` over the epochs, which looks at the test set, and `selected`,
        which looks at the validation set if there is one; `diverged` is the first epoch
        without a finite loss, or None.
    """
    best = best_on_test(rows)
    lost = [
        row["epoch"]
        for row in rows
        if row["train_loss"] is None or row["test_loss"] is None
    ]
    found = {
        "last": rows[-1]["test_accuracy"],
        "best": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "diverged": min(lost, default=None),
    }
    if "validation_accuracy" in rows[-1]:
        chosen = selected(rows)
        found["selected"] = chosen["test_accuracy"]
        found["selected_epoch"] = chosen["epoch"]
    return found


def speed(rows: Sequence[Row], images: int) -> Row:
    """Return the seconds of a run and its images per second.

    Args:
        rows: of `metrics.jsonl`, one per epoch.
        images: seen in an epoch.

    Returns:
        `seconds` of all epochs with their analysis, `analysis` of them, and
        `images_per_second` of all epochs but the first, which warms up.
    """
    analysis = [row["analysis_seconds"] for row in rows]
    seconds = [row["train_seconds"] + row["analysis_seconds"] for row in rows]
    steady = sum(seconds[1:])
    return {
        "seconds": sum(seconds),
        "analysis_seconds": sum(analysis),
        "images_per_second": images * (len(rows) - 1) / steady if steady else None,
    }


def _without(content: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


def _anywhere(commands: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the commands without the places of one machine; equal ones once."""
    found = []
    for command in commands:
        text = commandline.without_places(command["command"], "data-dir", "out")
        portable = {**command, "command": text.replace(" --resume", "")}
        if portable not in found:
            found.append(portable)
    return found
