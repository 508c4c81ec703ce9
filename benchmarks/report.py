"""What runs came to, as tables in Markdown.

Accuracies go from 0 to 1. A run whose loss is no longer finite counts as it is.
"""

import dataclasses
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.arms import ARMS
from benchmarks.cells import table
from benchmarks.commandline import without_places
from benchmarks.experiments import Experiment
from benchmarks.files import Row, write_json, write_text
from benchmarks.page import page
from benchmarks.published import settings
from benchmarks.runs import LAYERS, METRICS, Run

Summary = Mapping[str, Any]
Place = tuple[str, str]  # Variant and arm.

REPORT, SUMMARY = "report.md", "summary.json"

LEGEND = (
    "Accuracies on the test set: `last`, of the last epoch; `selected`, of the first "
    "epoch with the best validation accuracy, if rows are held out; `best on test`, of "
    "the epoch that the test set itself chose, as published and too high."
)
_ACCURACIES = {
    "last": "Test accuracy after the last epoch, %:",
    "selected": "Test accuracy of the epoch that is best on the validation set, %:",
    "best": (
        "Best test accuracy of all epochs, %. It is selected on the test set, as the "
        "published accuracies are, and is too high for that:"
    ),
}


def read(runs: Sequence[Run], name: str) -> pd.DataFrame:
    """Return the rows of `METRICS` or `LAYERS` of all runs; null is NaN."""
    return pd.DataFrame([row for run in runs for row in run.rows(name)])


def outcome(epochs: pd.DataFrame) -> Row:
    """Return the test accuracies of a run, and where its loss was no longer finite.

    Args:
        epochs: a row of `METRICS` per epoch.

    Returns:
        `last`; `best` over the epochs, which looks at the test set; `selected`, the
        first of the best on the validation set, if there is one; `diverged`, the first
        epoch without a finite loss, or None.
    """
    epochs = epochs.reset_index(drop=True)
    lost = epochs["epoch"][epochs[["train_loss", "test_loss"]].isna().any(axis=1)]
    found = {
        "last": float(epochs["test_accuracy"].iloc[-1]),
        "diverged": None if lost.empty else int(lost.min()),
    }
    for name, part in (("best", "test"), ("selected", "validation")):
        if f"{part}_accuracy" in epochs:
            row = epochs.loc[epochs[f"{part}_accuracy"].idxmax()]
            found[name] = float(row["test_accuracy"])
            found[f"{name}_epoch"] = int(row["epoch"])
    return found


def speed(epochs: pd.DataFrame, images: int) -> Row:
    """Return the seconds of a run and its images per second.

    Args:
        epochs: a row of `METRICS` per epoch.
        images: images that an epoch trains on.

    Returns:
        `seconds` of all epochs with their analysis, `analysis_seconds` of them, and
        `images_per_second` of all epochs but the first, which warms up.
    """
    seconds = epochs["train_seconds"] + epochs["analysis_seconds"]
    steady = float(seconds.iloc[1:].sum())
    return {
        "seconds": float(seconds.sum()),
        "analysis_seconds": float(epochs["analysis_seconds"].sum()),
        "images_per_second": images * (len(epochs) - 1) / steady if steady else None,
    }


# --- one directory of `benchmarks.train` ----------------------------------------------


def run_sections(runs: Sequence[Run]) -> list[tuple[str, list[Row]]]:
    """Return headings and rows: of the arms, and of the layers of each arm."""
    sections = [("Arms", [_arm_row(run) for run in runs])]
    for run in runs:
        layers = read([run], LAYERS)
        last = layers[layers["epoch"] == layers["epoch"].max()]
        rows = [_layer_row(row, run.arm) for row in last.to_dict("records")]
        sections.append((f"{ARMS[run.arm].title}: layers", rows))
    return sections


def run_tables(runs: Sequence[Run]) -> str:
    """Return a table of the arms, and one of the layers of each."""
    (_, arms), *layers = run_sections(runs)
    parts = [table(arms), LEGEND]
    parts += [f"{heading}\n\n{table(rows)}" for heading, rows in layers]
    return "\n\n".join(parts) + "\n"


def run_page(runs: Sequence[Run], pictures: Sequence[Path]) -> str:
    """Return the same and the settings as a page of HTML, with pictures inside."""
    config = runs[0].config
    settings = [
        {"setting": name, "value": str(value)}
        for name, value in dataclasses.asdict(config).items()
        if name not in ("arm", "data_dir")  # A page says nothing of places.
    ]
    title = f"{config.model} on {config.dataset}, seed {config.seed}"
    sections = [*run_sections(runs), ("Settings", settings)]
    return page(title, LEGEND.replace("`", ""), sections, pictures)


def _arm_row(run: Run) -> Row:
    epochs = read([run], METRICS)
    found, taken = outcome(epochs), speed(epochs, 0)
    losses = {
        f"{part} loss": f"{epochs[f'{part}_loss'].astype(float).iloc[-1]:.4f}"
        for part in ("train", "test")
    }
    names = {"last": "last", "selected": "selected", "best": "best on test"}
    return {
        "arm": f"{run.arm} ({ARMS[run.arm].title})",
        "epochs": len(epochs),
        **{key: cell.replace("nan", "not finite") for key, cell in losses.items()},
        **{names[key]: f"{found[key]:.2%}" for key in names if key in found},
        "seconds": f"{taken['seconds']:.1f}",
        "in analysis": f"{taken['analysis_seconds'] / taken['seconds']:.1%}",
    }


def _layer_row(row: Mapping[Any, Any], arm: str) -> Row:
    cells = {
        "layer": row["layer"],
        "alpha": f"{row['alpha']:.3f}" if row["fitted"] else "not fitted",
        "KS distance": f"{row['ks_distance']:.3f}" if row["fitted"] else "",
        "tail size": row["tail_size"],
        "N": row["eigenvalue_count"],
    }
    if ARMS[arm].balanced:
        cells["multiplier"] = f"{row['multiplier']:.3f}"
        cells["tuned"] = "yes" if row["tuned"] else "no"
    return cells


# --- a comparison ---------------------------------------------------------------------


def write(experiment: Experiment) -> None:
    """Write the summary and the report, which shows the pictures that are there."""
    summary = summarize(experiment)
    write_json(experiment.path / SUMMARY, summary)
    pictures = sorted(path.name for path in experiment.path.glob("*.png"))
    parts = section(summary, pictures)
    write_text(experiment.path / REPORT, "\n\n".join(parts) + "\n")


def summarize(experiment: Experiment) -> dict[str, Any]:
    """Return everything that the tables of a comparison need, as JSON has it."""
    runs = []
    for run in experiment.runs():
        own = {"variant": run.variant, "arm": run.arm, "seed": run.config.seed}
        epochs = read([run], METRICS)
        own["epochs"] = len(epochs)
        if len(epochs) == run.config.epochs:
            batch = run.config.batch_size  # Only whole batches are seen.
            images = run.train_rows() // batch * batch
            own |= outcome(epochs) | speed(epochs, images)
        runs.append(own)
    left_out = ("arms", "seed", "data_dir")
    return {
        "name": experiment.name,
        "commands": portable(experiment.commands),
        "configs": {
            variant: {
                name: value
                for name, value in dataclasses.asdict(config).items()
                if name not in left_out
            }
            for variant, config in experiment.configs.items()
        },
        "settings": {
            variant: {
                arm: dataclasses.asdict(settings(config, arm))
                for arm in experiment.arms
            }
            for variant, config in experiment.configs.items()
        },
        "arms": list(experiment.arms),
        "seeds": list(experiment.seeds),
        "runs": runs,
    }


def portable(commands: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the commands without the paths of one machine; equal ones once."""
    found = []
    for command in commands:
        text = without_places(command["command"], "data-dir", "out")
        portable = {**command, "command": text.replace(" --resume", "")}
        if portable not in found:
            found.append(portable)
    return json.loads(json.dumps(found))


def section(summary: Summary, pictures: Sequence[str]) -> Iterator[str]:
    """Give the parts of a comparison's section.

    Args:
        summary: what the runs came to.
        pictures: links to its pictures.
    """
    runs = pd.DataFrame(summary["runs"])
    devices = {_device(command): None for command in summary["commands"]}
    lengths = sorted({config["epochs"] for config in summary["configs"].values()})
    epochs = f"{' or '.join(map(str, lengths))} epoch{'s' if lengths != [1] else ''}"
    yield f"## Comparison {summary['name']}, {epochs}: {', '.join(devices)}"
    yield from _remarks(summary, runs)
    for field, words in _ACCURACIES.items():
        if field in runs:
            yield words
            yield table(_accuracy_rows(summary, 100 * _by_seed(runs, field)))
    if "last" in runs:
        yield (
            "Images per second of training, refreshes of the multipliers included, "
            "without the first epoch:"
        )
        yield table(_speed_rows(summary, runs))
    for picture in pictures:
        yield f"![{PurePosixPath(picture).stem}]({picture})"
    yield from _setting(summary)


def paired(one: pd.Series, other: pd.Series, form: str, *, ratio: bool = False) -> str:
    """Return a cell: the mean difference (or ratio) of equal seeds, and its interval.

    The interval is that of 95 % by Student's t,

        mean ± t(0.975, n - 1) * deviation / sqrt(n).

    References:
        Student, `The Probable Error of a Mean <https://doi.org/10.2307/2331554>`_, 1908
    """
    pairs = (one / other if ratio else one - other).dropna()
    if pairs.empty:
        return ""
    mean = form.format(pairs.mean())
    if len(pairs) == 1:
        return mean
    center, margin = interval(pairs)
    low, high = form.format(center - margin), form.format(center + margin)
    return f"{mean} [{low}, {high}]"


def interval(samples: pd.Series) -> tuple[float, float]:
    """Return the mean of two or more samples, and half its interval of 95 %."""
    margin = stats.t.ppf(0.975, len(samples) - 1) * stats.sem(samples)
    return float(samples.mean()), float(margin)


def mean_cell(samples: pd.Series, form: str) -> str:
    """Return the mean of samples, and their deviation if there are several."""
    samples = samples.dropna()
    if samples.empty:
        return ""
    mean = form.format(samples.mean())
    return mean if len(samples) == 1 else f"{mean} ± {form.format(samples.std())}"


def _by_seed(runs: pd.DataFrame, field: str) -> pd.DataFrame:
    """Return a number of each run: a line per seed, a column per variant and arm."""
    values = runs.astype({field: float})
    return values.pivot(index="seed", columns=["variant", "arm"], values=field)


def _remarks(summary: Summary, runs: pd.DataFrame) -> Iterator[str]:
    seeds = summary["seeds"]
    named = ", ".join(map(str, seeds))
    yield (
        f"Seeds: {named}. A cell is the mean over seeds ± the sample standard "
        "deviation; a difference or a ratio is paired by seed, with the 95 % interval "
        "of its mean by Student's t. No finished run is left out."
    )
    if len(seeds) == 1:
        yield "One seed: there is neither a deviation nor an interval."
    missing, lost = [], []
    for run in runs.to_dict("records"):
        name = f"{run['variant']}/{run['arm']} seed {run['seed']}"
        epochs = summary["configs"][run["variant"]]["epochs"]
        if pd.isna(run.get("last")):
            missing.append(f"{name} ({run['epochs']} of {epochs} epochs)")
        elif not pd.isna(run["diverged"]):
            lost.append(f"{name} (first in epoch {run['diverged']:.0f})")
    if missing:
        yield f"Not finished: {', '.join(missing)}."
    if lost:
        yield f"A loss was not finite: {', '.join(lost)}."


def _accuracy_rows(summary: Summary, percent: pd.DataFrame) -> Iterator[Row]:
    for row, place in _rows(summary):
        samples = _column(percent, place)
        row["seeds"] = str(samples.count())
        row["accuracy"] = mean_cell(samples, "{:.2f}")
        for name, other in _others(summary, place):
            row[f"difference to {name}"] = (
                paired(samples, _column(percent, other), "{:+.2f}") if other else ""
            )
        yield row


def _speed_rows(summary: Summary, runs: pd.DataFrame) -> Iterator[Row]:
    speeds = _by_seed(runs, "images_per_second")
    seconds = _by_seed(runs, "seconds").sum()
    analysis_seconds = _by_seed(runs, "analysis_seconds").sum()
    for row, place in _rows(summary):
        samples = _column(speeds, place)
        row["images per second"] = mean_cell(samples, "{:.0f}")
        for name, other in _others(summary, place):
            row[f"ratio to {name}"] = (
                paired(samples, _column(speeds, other), "{:.3f}", ratio=True)
                if other
                else ""
            )
        total = float(seconds[place])
        share = float(analysis_seconds[place]) / total if total else 0.0
        row["time of all seeds"] = str(datetime.timedelta(seconds=round(total)))
        row["in refreshes"] = f"{share:.2%}"
        yield row


def _column(numbers: pd.DataFrame, place: Place) -> pd.Series:
    if place in numbers:
        return numbers[place]
    return pd.Series(np.nan, numbers.index)


def _rows(summary: Summary) -> Iterator[tuple[Row, Place]]:
    """Give the first cells of each row, and what it is about."""
    for variant in summary["configs"]:
        for arm in summary["arms"]:
            row = {"variant": variant} if len(summary["configs"]) > 1 else {}
            yield row | {"arm": f"{arm} ({ARMS[arm].title})"}, (variant, arm)


def _others(summary: Summary, place: Place) -> Iterator[tuple[str, Place | None]]:
    """Give what a place is compared with, or None for itself: first arm, variant."""
    variant, arm = place
    first_arm, first_variant = summary["arms"][0], next(iter(summary["configs"]))
    if len(summary["arms"]) > 1:
        yield first_arm, None if arm == first_arm else (variant, first_arm)
    if len(summary["configs"]) > 1:
        other = None if variant == first_variant else (first_variant, arm)
        yield first_variant, other


def _setting(summary: Summary) -> Iterator[str]:
    """Give the configuration, the commands, the machines, and the versions."""
    yield "Numbers of the arms:"
    yield table(_number_rows(summary))
    configs = list(summary["configs"].values())
    common = [
        f"{name} {value}"
        for name, value in configs[0].items()
        if value is not None and all(own[name] == value for own in configs)
    ]
    yield f"Configuration: {', '.join(common)}."
    yield from machines(summary["commands"])


def machines(commands: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Give each machine, and the commands that ran on it."""
    by_machine: dict[str, list[str]] = {}
    for command in commands:
        hardware, versions = command["hardware"], command["versions"]
        host = f"{hardware['processor']}, {hardware['cores']} cores"
        named = ", ".join(f"{name} {text}" for name, text in versions.items())
        machine = f"On {_device(command)}, host {host}; {named}:"
        by_machine.setdefault(machine, []).append(command["command"])
    for machine, lines in by_machine.items():
        yield machine
        yield "\n".join(["```bash", *lines, "```"])


def _number_rows(summary: Summary) -> Iterator[Row]:
    configs, numbers = summary["configs"], summary["settings"]
    varied = [
        name
        for name in next(iter(configs.values()))
        if len({str(own[name]) for own in configs.values()}) > 1
        # These have a column of their own, as they are there without a value too.
        and name not in ("learning_rate", "low", "high")
    ]
    for row, (variant, arm) in _rows(summary):
        row |= {name: str(configs[variant][name]) for name in varied}
        own = numbers[variant][arm]
        row["first learning rate"] = f"{own['learning_rate']:g}"
        bounds = f"{own['low']:g} to {own['high']:g}"
        row["multipliers"] = bounds if ARMS[arm].balanced else ""
        yield row


def _device(command: Mapping[str, Any]) -> str:
    return f"{command['hardware']['device']} ({command['hardware']['platform']})"
