"""What runs came to, as tables in Markdown.

Accuracies go from 0 to 1. A run whose loss is no longer finite counts as it is.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from benchmarks.arms import ARMS
from benchmarks.cells import Row, listed, mean_cell, page, paired, table
from benchmarks.experiments import Experiment
from benchmarks.files import write_json, write_text
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


def outcome(epochs: pd.DataFrame, images: int = 0) -> Row:
    """Return the test accuracies of a run, its seconds and its speed.

    Args:
        epochs: a row of `METRICS` per epoch.
        images: images that an epoch trains on.

    Returns:
        `last`; `best` over the epochs, which looks at the test set; `selected`, the
        first of the best on the validation set, if there is one; `diverged`, the first
        epoch without a finite loss, or None; `seconds` of all epochs with their
        analysis, `analysis_seconds` of them, and `images_per_second` of all epochs but
        the first, which warms up.
    """
    epochs = epochs.set_index("epoch")
    lost = epochs[["train_loss", "test_loss"]].isna().any(axis=1)
    seconds = epochs["train_seconds"] + epochs["analysis_seconds"]
    steady = float(seconds.iloc[1:].sum())
    found = {
        "last": float(epochs["test_accuracy"].iloc[-1]),
        "diverged": int(lost.idxmax()) if lost.any() else None,
        "seconds": float(seconds.sum()),
        "analysis_seconds": float(epochs["analysis_seconds"].sum()),
        "images_per_second": images * (len(epochs) - 1) / steady if steady else None,
    }
    for name, part in (("best", "test"), ("selected", "validation")):
        if f"{part}_accuracy" in epochs:
            epoch: Any = epochs[f"{part}_accuracy"].idxmax()
            found[name] = float(epochs["test_accuracy"][epoch])
            found[f"{name}_epoch"] = int(epoch)
    return found


# --- one directory of `benchmarks.train` ----------------------------------------------


def write_run(runs: Sequence[Run], pictures: Sequence[Path], directory: Path) -> str:
    """Write `table.md`, and `report.html` with the pictures; return the tables."""
    config = runs[0].config
    arms = [_arm_row(run, read([run], METRICS)) for run in runs]
    layers = []
    for run in runs:
        rows = read([run], LAYERS)
        last = rows[rows["epoch"] == rows["epoch"].max()].to_dict("records")
        own = [_layer_row(row, run.arm) for row in last]
        layers.append((f"{ARMS[run.arm].title}: layers", own))
    parts = [table(arms), LEGEND]
    parts += [f"{heading}\n\n{table(rows)}" for heading, rows in layers]
    text = "\n\n".join(parts) + "\n"
    write_text(directory / "table.md", text)
    settings = [
        {"setting": name, "value": str(value)}
        for name, value in dataclasses.asdict(config).items()
        if name != "data_dir"  # A page says nothing of places.
    ]
    title = f"{config.model} on {config.dataset}, seed {config.seed}"
    sections = [("Arms", arms), *layers, ("Settings", settings)]
    about = LEGEND.replace("`", "")
    write_text(directory / "report.html", page(title, about, sections, pictures))
    return text


def _arm_row(run: Run, epochs: pd.DataFrame) -> Row:
    found = outcome(epochs)
    row = {"arm": f"{run.arm} ({ARMS[run.arm].title})", "epochs": len(epochs)}
    for part in ("train", "test"):
        loss = f"{epochs[f'{part}_loss'].astype(float).iloc[-1]:.4f}"
        row[f"{part} loss"] = loss.replace("nan", "not finite")
    names = {"last": "last", "selected": "selected", "best": "best on test"}
    row |= {names[key]: f"{found[key]:.2%}" for key in names if key in found}
    row["seconds"] = f"{found['seconds']:.1f}"
    row["in analysis"] = f"{found['analysis_seconds'] / found['seconds']:.1%}"
    return row


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
    runs, configs, numbers = [], {}, {}
    for run in experiment.runs():
        own = {"variant": run.variant, "arm": run.arm, "seed": run.config.seed}
        epochs = read([run], METRICS)
        own["epochs"] = len(epochs)
        if len(epochs) == run.config.epochs:
            batch = run.config.batch_size  # Only whole batches are seen.
            own |= outcome(epochs, run.record()["train_rows"] // batch * batch)
        runs.append(own)
    for variant, config in experiment.configs.items():
        configs[variant] = dataclasses.asdict(config)
        for name in ("arms", "seed", "data_dir"):
            del configs[variant][name]
        numbers[variant] = {
            arm: settings(config, arm)._asdict() for arm in experiment.arms
        }
    return {
        "name": experiment.name,
        "commands": portable(experiment.commands),
        "configs": configs,
        "settings": numbers,
        "arms": list(experiment.arms),
        "seeds": list(experiment.seeds),
        "runs": runs,
    }


def portable(commands: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the commands without the paths of one machine; equal ones once."""
    found = []
    for command in commands:
        text = re.sub(r"--(data-dir|out)[ =]\S+", r"--\1 DIRECTORY", command["command"])
        portable = {**command, "command": text.replace(" --resume", "")}
        if portable not in found:
            found.append(portable)
    return json.loads(json.dumps(found))


def section(summary: Summary, pictures: Sequence[str]) -> Iterator[str]:
    """Give the parts of a comparison's section, with links to its pictures."""
    runs, configs = pd.DataFrame(summary["runs"]), summary["configs"]
    devices = {_device(command): None for command in summary["commands"]}
    lengths = sorted({config["epochs"] for config in configs.values()})
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
    yield "Numbers of the arms:"
    # What every variant has alike, and what is varied.
    frame = pd.DataFrame(list(configs.values()), dtype=object)
    common = {
        str(name): values.iloc[0]
        for name, values in frame.items()
        if values.map(str).nunique() == 1
    }
    varied = [name for name in map(str, frame) if name not in common]
    yield table(_number_rows(summary, varied))
    common = {name: value for name, value in common.items() if value is not None}
    yield f"Configuration: {listed(common)}."
    yield from machines(summary["commands"])


def _by_seed(runs: pd.DataFrame, field: str) -> pd.DataFrame:
    """Return a number of each run: a line per seed, a column per variant and arm."""
    values = runs.astype({field: float})
    return values.pivot(index="seed", columns=["variant", "arm"], values=field)


def _remarks(summary: Summary, runs: pd.DataFrame) -> Iterator[str]:
    seeds = summary["seeds"]
    yield (
        f"Seeds: {', '.join(map(str, seeds))}. A cell is the mean over seeds ± the "
        "sample standard deviation; a difference or a ratio is paired by seed, with "
        "the 95 % interval of its mean by Student's t. No finished run is left out."
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
        row["seeds"] = percent[place].count()
        row["accuracy"] = mean_cell(percent[place], "{:.2f}")
        yield row | _paired(summary, percent, place, "difference", "{:+.2f}")


def _speed_rows(summary: Summary, runs: pd.DataFrame) -> Iterator[Row]:
    speeds = _by_seed(runs, "images_per_second")
    seconds = _by_seed(runs, "seconds").sum()
    analysis_seconds = _by_seed(runs, "analysis_seconds").sum()
    for row, place in _rows(summary):
        row["images per second"] = mean_cell(speeds[place], "{:.0f}")
        row |= _paired(summary, speeds, place, "ratio", "{:.3f}")
        total = float(seconds[place])
        share = float(analysis_seconds[place]) / total if total else 0.0
        row["time of all seeds"] = str(datetime.timedelta(seconds=round(total)))
        row["in refreshes"] = f"{share:.2%}"
        yield row


def _number_rows(summary: Summary, varied: Sequence[str]) -> Iterator[Row]:
    for row, (variant, arm) in _rows(summary):
        own = summary["configs"][variant] | summary["settings"][variant][arm]
        # These have a column of their own, as they are there without a value too.
        columns = [x for x in varied if x not in ("learning_rate", "low", "high")]
        row |= {name: str(own[name]) for name in columns}
        row["first learning rate"] = f"{own['learning_rate']:g}"
        bounds = f"{own['low']:g} to {own['high']:g}"
        row["multipliers"] = bounds if ARMS[arm].balanced else ""
        yield row


def _rows(summary: Summary) -> Iterator[tuple[Row, Place]]:
    """Give the first cells of each row, and what it is about."""
    for variant in summary["configs"]:
        for arm in summary["arms"]:
            row = {"variant": variant} if len(summary["configs"]) > 1 else {}
            yield row | {"arm": f"{arm} ({ARMS[arm].title})"}, (variant, arm)


def _paired(
    summary: Summary, values: pd.DataFrame, place: Place, what: str, form: str
) -> Row:
    """Compare a place with the first arm and with the first variant, seed by seed."""
    (variant, arm), row, others = place, {}, {}
    if len(arms := summary["arms"]) > 1:
        others[arms[0]] = variant, arms[0]
    if len(variants := list(summary["configs"])) > 1:
        others[variants[0]] = variants[0], arm
    for name, other in others.items():
        cell = paired(values[place], values[other], form, ratio=what == "ratio")
        row[f"{what} to {name}"] = "" if other == place else cell
    return row


def machines(commands: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Give each machine, and the commands that ran on it."""
    by_machine: dict[str, list[str]] = {}
    for command in commands:
        hardware, versions = command["hardware"], command["versions"]
        host = f"{hardware['processor']}, {hardware['cores']} cores"
        machine = f"On {_device(command)}, host {host}; {listed(versions)}:"
        by_machine.setdefault(machine, []).append(command["command"])
    for machine, lines in by_machine.items():
        yield machine
        yield "\n".join(["```bash", *lines, "```"])


def _device(command: Mapping[str, Any]) -> str:
    return f"{command['hardware']['device']} ({command['hardware']['platform']})"
