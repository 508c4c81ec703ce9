"""What a study came to: tables, pictures and a page, from its evaluations."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.cells import Row, interval, listed, mean_cell, page, paired, table
from benchmarks.files import write_text
from benchmarks.protocol import chosen, grid
from benchmarks.report import machines, portable
from benchmarks.studies import Directory

REPORT, PAGE = "report.md", "report.html"

_HELD = (
    "A difference is paired by seed, with the 95 % interval of its mean by Student's "
    "t; below 0 is better. No finished run is left out; the test rows are read once."
)


def write(directory: Directory) -> str:
    """Write the report, and the page with its pictures; return the report."""
    findings, pictures = Findings(directory), []
    for name, figure in findings.figures().items():
        pictures.append(directory.path / name)
        figure.savefig(pictures[-1], dpi=120)
    links = [picture.name for picture in pictures]
    report = "\n\n".join(findings.section(links)) + "\n"
    write_text(directory.path / REPORT, report)
    text = page(
        f"Study {directory.name}", findings.about(), findings.tables(), pictures
    )
    write_text(directory.path / PAGE, text)
    return report


class Findings:
    """The tables and pictures of a study."""

    def __init__(self, directory: Directory):
        self.directory, self.study = directory, directory.study
        self.titles = {name: arm.title for name, arm in self.study.arms.items()}
        self.losses = directory.losses()
        rows = [row for rows in directory.evaluations().values() for row in rows]
        self.sweep, self.fresh = (
            _frame([row for row in rows if row["phase"] == phase])
            for phase in ("sweep", "fresh")
        )

    def section(self, pictures: Sequence[str]) -> Iterator[str]:
        """Give the parts of the section in Markdown."""
        recorded = self.directory.recorded()
        config, commands = recorded["config"], recorded["commands"]
        devices = {command["hardware"]["device"]: None for command in commands}
        yield f"## Study {self.directory.name}: {', '.join(devices)}"
        yield self.about()
        for words, rows in self.tables():
            yield f"{words}:"
            yield table(rows)
        for picture in pictures:
            yield f"![{Path(picture).stem}]({picture})"
        sweep, fresh = (
            ", ".join(map(str, seeds))
            for seeds in (self.study.sweep_seeds, self.study.fresh_seeds)
        )
        setting = {name: value for name, value in config.items() if value is not None}
        yield (
            f"Seeds of the sweep: {sweep}; fresh ones: {fresh}. "
            f"Setting: {listed(setting)}."
        )
        yield from machines(portable(commands))

    def brief(self) -> str:
        """Return the one table that answers whether a method helps."""
        found, first = list(self._fresh_rows()), self.titles[self.study.swept[0]]
        matched = {self.titles.get(self._control(arm)) for arm in self.study.swept}
        seeds = " or ".join(map(str, sorted({row["seeds"] for row in found})))
        rows = [
            {
                "arm": row["arm"],
                "rate": row["rate"],
                "test loss": row["test loss"],
                f"less that of {first}": row[f"to {first}"],
                "less that of its control or method": row["to its control or method"],
            }
            for row in found
            if row["arm"] not in matched
        ]
        return (
            f"{table(rows)}\n\nMean ± sample deviation over {seeds} fresh seeds; "
            "differences are paired by seed, with the 95 % interval of their mean. The "
            "last column compares a method with its mean-matched control, and the "
            "other controls with their method."
        )

    def tables(self) -> list[tuple[str, list[Row]]]:
        """Return the tables that have rows: fresh seeds, equal seconds, the sweep."""
        found = {
            "Loss of fresh seeds after equally many steps": self._fresh_rows,
            "Validation loss of fresh seeds after equally many seconds": (
                self._seconds_rows
            ),
            "Sweep: mean validation loss by learning rate; the chosen one is in bold": (
                self._sweep_rows
            ),
        }
        tables = [(words, list(rows())) for words, rows in found.items()]
        return [(words, rows) for words, rows in tables if rows]

    def _fresh_rows(self) -> Iterator[Row]:
        if self.fresh.empty:
            return
        validation, test = (
            _by_seed(self.fresh, f"{part}_loss") for part in ("validation", "test")
        )
        accuracy = 100 * _by_seed(self.fresh, "test_accuracy")
        rates, first = self.fresh.groupby("arm")["rate"].first(), self.study.swept[0]
        for arm in (arm for arm in self.study.arms if arm in test):
            # A method is compared with its mean-matched control, a control with its
            # method.
            other = self.study.parents.get(arm) or self._control(arm)
            to_first = paired(test[arm], test[first], "{:+.4f}")
            yield {
                "arm": self.titles[arm],
                "rate": f"{rates[arm]:g}",
                "seeds": int(test[arm].count()),
                "validation loss": mean_cell(validation[arm], "{:.4f}"),
                "test loss": mean_cell(test[arm], "{:.4f}"),
                "test accuracy, %": mean_cell(accuracy[arm], "{:.2f}"),
                f"to {self.titles[first]}": "" if arm == first else to_first,
                "to its control or method": (
                    paired(test[arm], test[other], "{:+.4f}") if other in test else ""
                ),
            }

    def _control(self, arm: str) -> str:
        """Return the first control of a method, which is the mean-matched one."""
        return next((name for name, of in self.study.parents.items() if of == arm), "")

    def _seconds_rows(self) -> Iterator[Row]:
        """Compare every arm at the seconds that the first one takes for all its steps.

        Seconds are those of `--timing`, all arms in turn; without it, those of the
        trials, paired by seed and evaluation. The median counts. The loss is
        interpolated between evaluations: an arm that is slower has not reached the end
        of its schedule by then.
        """
        if self.fresh.empty:
            return
        both = self.fresh["train_seconds"] + self.fresh["analysis_seconds"]
        seconds = self.fresh.assign(seconds=both).pivot(
            index=["seed", "epoch"], columns="arm", values="seconds"
        )
        if timed := self.directory.seconds():
            seconds = pd.DataFrame(timed)
        first, last = self.study.swept[0], self.study.config.epochs
        for arm in (arm for arm in self.study.arms if arm in seconds):
            ratio = float((seconds[arm] / seconds[first]).median())
            reached = last / max(1.0, ratio)
            curves = self.fresh[self.fresh["arm"] == arm].pivot(
                index="seed", columns="epoch", values="validation_loss"
            )
            places = curves.columns.to_numpy(float)
            losses = [np.interp(reached, places, curve) for curve in curves.to_numpy()]
            yield {
                "arm": self.titles[arm],
                "seconds of a run": f"{last * seconds[arm].median():.1f}",
                f"to {self.titles[first]}": f"{ratio:.3f}",
                "steps by then": f"{reached / last:.1%}",
                "validation loss by then": mean_cell(pd.Series(losses), "{:.4f}"),
            }

    def _sweep_rows(self) -> Iterator[Row]:
        if self.sweep.empty:
            return
        means = _sweep_means(self.sweep).reindex(self.study.swept)
        for arm in self.study.swept:
            row = {"arm": self.titles[arm]}
            best = chosen(self.study, self.losses, arm)
            done = all(rate in means for rate in grid(self.study, self.losses, arm))
            for rate, mean in means.loc[arm].items():
                cell = "" if pd.isna(mean) else f"{mean:.4f}"
                row[f"{rate:g}"] = f"**{cell}**" if done and rate == best else cell
            yield row

    def about(self) -> str:
        """Say how to read the tables, what is missing, and what has gone wrong."""
        parts, missing = [_HELD], self.directory.todo()
        if missing:
            fresh = all(trial.phase == "fresh" for trial in missing)
            which = "of the trials with fresh seeds are missing"
            what = which if fresh else "trials of the sweep are missing"
            parts.append(f"Not finished: {len(missing)} {what}.")
        if lost := [str(trial) for trial, x in self.losses.items() if np.isnan(x)]:
            parts.append(f"The loss was not finite in {', '.join(lost)}.")
        ends = []
        for arm in self.study.swept if not missing else ():
            rates = grid(self.study, self.losses, arm)
            if chosen(self.study, self.losses, arm) in (min(rates), max(rates)):
                ends.append(self.titles[arm])
        if ends:
            which = ", ".join(ends)
            parts.append(f"The best rate is at an end of the grid for {which}.")
        return " ".join(parts)

    def figures(self) -> dict[str, Figure]:
        """Return loss against rate of the sweep, and the differences of fresh seeds."""
        found = {}
        if not self.sweep.empty:
            found["rates.png"] = self._rates_figure()
        if not self.fresh.empty and self.fresh["seed"].nunique() > 1:
            found["differences.png"] = self._differences_figure()
        return found

    def _rates_figure(self) -> Figure:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes, means = figure.subplots(), _sweep_means(self.sweep)
        last = _last(self.sweep)
        for number, arm in enumerate(self.study.swept):
            if arm not in means.index:
                continue
            style, own = {"color": f"C{number}"}, last[last["arm"] == arm]
            curve = means.loc[arm].dropna()
            axes.plot(curve, marker="o", label=self.titles[arm], **style)
            axes.scatter(own["rate"], own["validation_loss"], s=9, alpha=0.6, **style)
        axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss")
        axes.set_xticks(means.columns, [f"{rate:g}" for rate in means.columns])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title("Sweep: mean over seeds, and each seed")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        return figure

    def _differences_figure(self) -> Figure:
        test, first = _by_seed(self.fresh, "test_loss"), self.study.swept[0]
        pairs = [(arm, first) for arm in self.study.arms if arm != first]
        pairs += [(of, name) for name, of in self.study.parents.items()]
        pairs = [pair for pair in pairs if set(pair) <= set(test)]
        figure = Figure(figsize=(8, 0.9 + 0.32 * len(pairs)), layout="constrained")
        axes = figure.subplots()
        for place, (arm, other) in enumerate(pairs):
            differences = (test[arm] - test[other]).dropna()
            mean, margin = interval(differences)
            color = "C0" if other == first else "C1"
            axes.errorbar(mean, place, xerr=margin, fmt="o", color=color, capsize=3)
            axes.scatter(differences, [place] * len(differences), s=8, color="0.6")
        axes.axvline(0, color="0.5", linestyle=":")
        titles = [f"{self.titles[a]} - {self.titles[b]}" for a, b in pairs]
        axes.set_yticks(range(len(pairs)), titles, fontsize="small")
        axes.invert_yaxis()
        axes.set_xlabel("difference of the test loss; below 0, the first is better")
        title = "Fresh seeds: each pair, mean and 95 % interval"
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3, axis="x")
        return figure


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return evaluations; a loss that is not finite is NaN."""
    frame = pd.DataFrame(rows)
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
