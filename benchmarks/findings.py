"""What a study came to: tables, pictures and a page, from its evaluations."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.cells import Row, interval, listed, mean_cell, page, paired, table
from benchmarks.files import write_text
from benchmarks.protocol import Study, chosen, grid
from benchmarks.report import machines, portable
from benchmarks.studies import Directory

REPORT, PAGE = "report.md", "report.html"

_HELD = (
    "A difference is paired by seed, with the 95 % interval of its mean by Student's "
    "t; below 0 is better. No finished run is left out; the test rows are read once."
)


def write(directory: Directory) -> str:
    """Write the report, and the page with its pictures; return the report."""
    pictures = []
    for name, figure in figures(directory).items():
        pictures.append(directory.path / name)
        figure.savefig(pictures[-1], dpi=120)
    links = [picture.name for picture in pictures]
    report = "\n\n".join(section(directory, links)) + "\n"
    write_text(directory.path / REPORT, report)
    about = " ".join([_HELD, *_state(directory)])
    text = page(f"Study {directory.name}", about, tables(directory), pictures)
    write_text(directory.path / PAGE, text)
    return report


def section(directory: Directory, pictures: Sequence[str]) -> Iterator[str]:
    """Give the parts of a study's section in Markdown."""
    study, recorded = directory.study, directory.recorded()
    config, commands = recorded["config"], recorded["commands"]
    devices = {command["hardware"]["device"]: None for command in commands}
    yield f"## Study {directory.name}: {', '.join(devices)}"
    yield " ".join([_HELD, *_state(directory)])
    for words, rows in tables(directory):
        yield f"{words}:"
        yield table(rows)
    for picture in pictures:
        yield f"![{Path(picture).stem}]({picture})"
    setting = {name: value for name, value in config.items() if value is not None}
    sweep, fresh = (
        ", ".join(map(str, seeds)) for seeds in (study.sweep_seeds, study.fresh_seeds)
    )
    yield (
        f"Seeds of the sweep: {sweep}; fresh ones: {fresh}. Setting: {listed(setting)}."
    )
    yield from machines(portable(commands))


def brief(directory: Directory) -> str:
    """Return the one table that answers whether a method helps."""
    study = directory.study
    first = study.arms[study.swept[0]].title
    matched = {_control(study, arm) for arm in study.swept}
    left_out = {study.arms[name].title for name in matched if name is not None}
    found = list(_fresh_rows(directory))
    seeds = " or ".join(map(str, sorted({int(row["seeds"]) for row in found})))
    rows = [
        {
            "arm": row["arm"],
            "rate": row["rate"],
            "test loss": row["test loss"],
            f"less that of {first}": row[f"to {first}"],
            "less that of its control or method": row["to its control or method"],
        }
        for row in found
        if row["arm"] not in left_out
    ]
    return (
        f"{table(rows)}\n\nMean ± sample deviation over {seeds} fresh seeds; "
        "differences are paired by seed, with the 95 % interval of their mean. The "
        "last column compares a method with its mean-matched control, and the other "
        "controls with their method."
    )


def tables(directory: Directory) -> list[tuple[str, list[Row]]]:
    """Return the tables that have rows: fresh seeds, equal seconds, the sweep."""
    found = {
        "Loss of fresh seeds after equally many steps": _fresh_rows,
        "Validation loss of fresh seeds after equally many seconds": _seconds_rows,
        "Sweep: mean validation loss by learning rate; the chosen one is in bold": (
            _sweep_rows
        ),
    }
    tables = [(words, list(rows(directory))) for words, rows in found.items()]
    return [(words, rows) for words, rows in tables if rows]


def _frame(directory: Directory, phase: str) -> pd.DataFrame:
    """Return the evaluations of a phase; a loss that is not finite is NaN."""
    rows = [row for rows in directory.evaluations().values() for row in rows]
    frame = pd.DataFrame([row for row in rows if row["phase"] == phase])
    return frame.astype({name: float for name in frame if str(name).endswith("loss")})


def _last(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows after the last update."""
    return frame[frame["epoch"] == frame["epoch"].max()]


def _by_seed(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a number after the last update: a line per seed, a column per arm."""
    return _last(frame).pivot(index="seed", columns="arm", values=column)


def _sweep_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the mean loss after the last update, a line per arm, by rate."""
    last = _last(frame)
    return last.pivot_table(index="arm", columns="rate", values="validation_loss")


def _fresh_rows(directory: Directory) -> Iterator[Row]:
    frame, study = _frame(directory, "fresh"), directory.study
    if frame.empty:
        return
    validation, test = _by_seed(frame, "validation_loss"), _by_seed(frame, "test_loss")
    accuracy = 100 * _by_seed(frame, "test_accuracy")
    rates = frame.groupby("arm")["rate"].first()
    first = study.swept[0]
    for arm in (arm for arm in study.arms if arm in test):
        # A method is compared with its mean-matched control, a control with its method.
        other = study.parents.get(arm) or _control(study, arm)
        to_first = paired(test[arm], test[first], "{:+.4f}")
        yield {
            "arm": study.arms[arm].title,
            "rate": f"{rates[arm]:g}",
            "seeds": str(test[arm].count()),
            "validation loss": mean_cell(validation[arm], "{:.4f}"),
            "test loss": mean_cell(test[arm], "{:.4f}"),
            "test accuracy, %": mean_cell(accuracy[arm], "{:.2f}"),
            f"to {study.arms[first].title}": "" if arm == first else to_first,
            "to its control or method": (
                paired(test[arm], test[other], "{:+.4f}") if other in test else ""
            ),
        }


def _control(study: Study, arm: str) -> str | None:
    """Return the first control of a method, which is the mean-matched one."""
    return next((name for name, of in study.parents.items() if of == arm), None)


def _seconds_rows(directory: Directory) -> Iterator[Row]:
    """Compare every arm at the seconds that the first one takes for all its steps.

    Seconds are those of `--timing`, all arms in turn; without it, those of the trials,
    paired by seed and evaluation. The median counts. The loss is interpolated between
    evaluations: an arm that is slower has not reached the end of its schedule by then.
    """
    fresh, study = _frame(directory, "fresh"), directory.study
    if fresh.empty:
        return
    fresh["seconds"] = fresh["train_seconds"] + fresh["analysis_seconds"]
    seconds = fresh.pivot(index=["seed", "epoch"], columns="arm", values="seconds")
    if timed := directory.seconds():
        seconds = pd.DataFrame(timed)
    first, last = study.swept[0], study.config.epochs
    for arm in (arm for arm in study.arms if arm in seconds):
        ratio = float((seconds[arm] / seconds[first]).median())
        reached = last / max(1.0, ratio)
        curves = fresh[fresh["arm"] == arm].pivot(
            index="seed", columns="epoch", values="validation_loss"
        )
        places = curves.columns.to_numpy(float)
        losses = [np.interp(reached, places, curve) for curve in curves.to_numpy()]
        yield {
            "arm": study.arms[arm].title,
            "seconds of a run": f"{last * seconds[arm].median():.1f}",
            f"to {study.arms[first].title}": f"{ratio:.3f}",
            "steps by then": f"{reached / last:.1%}",
            "validation loss by then": mean_cell(pd.Series(losses), "{:.4f}"),
        }


def _sweep_rows(directory: Directory) -> Iterator[Row]:
    study, losses = directory.study, directory.losses()
    frame = _frame(directory, "sweep")
    if frame.empty:
        return
    means = _sweep_means(frame).reindex(study.swept)
    for arm in study.swept:
        row = {"arm": study.arms[arm].title}
        best = chosen(study, losses, arm)
        done = all(rate in means for rate in grid(study, losses, arm))
        for rate, mean in means.loc[arm].items():
            cell = "" if pd.isna(mean) else f"{mean:.4f}"
            row[f"{rate:g}"] = f"**{cell}**" if done and rate == best else cell
        yield row


def figures(directory: Directory) -> dict[str, Figure]:
    """Return loss against rate of the sweep, and the differences of fresh seeds."""
    found = {}
    sweep, fresh = _frame(directory, "sweep"), _frame(directory, "fresh")
    if not sweep.empty:
        found["rates.png"] = _rates_figure(directory.study, sweep)
    if not fresh.empty and fresh["seed"].nunique() > 1:
        test = _by_seed(fresh, "test_loss")
        found["differences.png"] = _differences_figure(directory.study, test)
    return found


def _rates_figure(study: Study, sweep: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    last, means = _last(sweep), _sweep_means(sweep)
    for number, arm in enumerate(study.swept):
        if arm not in means.index:
            continue
        color, own, curve = f"C{number}", last[last["arm"] == arm], means.loc[arm]
        title = study.arms[arm].title
        axes.plot(curve.dropna(), color=color, marker="o", label=title)
        axes.scatter(own["rate"], own["validation_loss"], color=color, s=9, alpha=0.6)
    axes.set_xscale("log")
    axes.set_xticks(means.columns, [f"{rate:g}" for rate in means.columns])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss")
    axes.set_title("Sweep: mean over seeds, and each seed")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _differences_figure(study: Study, test: pd.DataFrame) -> Figure:
    first = study.swept[0]
    pairs = [(arm, first) for arm in study.arms if arm != first]
    pairs += [(of, name) for name, of in study.parents.items()]
    pairs = [(arm, other) for arm, other in pairs if arm in test and other in test]
    figure = Figure(figsize=(8, 0.9 + 0.32 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    for place, (arm, other) in enumerate(pairs):
        differences = (test[arm] - test[other]).dropna()
        mean, margin = interval(differences)
        color = "C0" if other == first else "C1"
        axes.errorbar(mean, place, xerr=margin, fmt="o", color=color, capsize=3)
        axes.scatter(differences, [place] * len(differences), s=8, color="0.6")
    axes.axvline(0, color="0.5", linestyle=":")
    titles = [f"{study.arms[a].title} - {study.arms[b].title}" for a, b in pairs]
    axes.set_yticks(range(len(pairs)), titles, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("difference of the test loss; below 0, the first is better")
    axes.set_title("Fresh seeds: each pair, mean and 95 % interval", fontsize="medium")
    axes.grid(alpha=0.3, axis="x")
    return figure


def _state(directory: Directory) -> Iterator[str]:
    """Say what is missing, and what has gone wrong."""
    study, losses, missing = directory.study, directory.losses(), directory.todo()
    if missing:
        fresh = all(trial.phase == "fresh" for trial in missing)
        which = "of the trials with fresh seeds are missing"
        what = which if fresh else "trials of the sweep are missing"
        yield f"Not finished: {len(missing)} {what}."
    if lost := [str(trial) for trial, loss in losses.items() if np.isnan(loss)]:
        yield f"The loss was not finite in {', '.join(lost)}."
    ends = []
    for arm in study.swept if not missing else ():
        rates = grid(study, losses, arm)
        if chosen(study, losses, arm) in (min(rates), max(rates)):
            ends.append(study.arms[arm].title)
    if ends:
        yield f"The best rate is at an end of the grid for {', '.join(ends)}."
