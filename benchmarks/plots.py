"""Pictures of runs, from their records and final spectra."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from benchmarks.arms import ARMS
from benchmarks.experiments import Experiment
from benchmarks.report import read
from benchmarks.runs import LAYERS, METRICS, Run
from tb_optax import plots

DPI = 150
PANELS = 4

# The ascending eigenvalues of each layer, by arm and layer.
Spectra = Mapping[str, Mapping[str, np.ndarray]]


def write_run(runs: Sequence[Run], spectra: Spectra, directory: Path) -> list[Path]:
    """Write the pictures of `benchmarks.train`; return their paths."""
    layers, arms = read(runs, LAYERS), [run.arm for run in runs]
    figures = {"alpha.png": alpha_figure(layers, arms)}
    for arm in arms:
        figures[f"{arm}.png"] = overview_figure(layers, spectra[arm], arm)
    return _save(figures, directory)


def write_comparison(experiment: Experiment) -> list[Path]:
    """Write the pictures that the runs so far allow; return their paths."""
    runs, arms = experiment.runs(), experiment.arms
    metrics, layers = read(runs, METRICS), read(runs, LAYERS)
    shown = dict.fromkeys([arms[0], *(arm for arm in arms if ARMS[arm].balanced)])
    figures = {}
    if not metrics.empty:
        figures["learning.png"] = learning_figure(metrics, arms)
    if not layers.empty:
        figures["alpha.png"] = alpha_figure(average(layers), list(shown)[:2])
    return _save(figures, experiment.path)


def average(layers: pd.DataFrame) -> pd.DataFrame:
    """Average the rows of `LAYERS` over the seeds of an arm that are furthest.

    A layer is tuned if it is for one of them, and its alpha is the mean of those that
    it is tuned for.
    """
    reached = layers.groupby(["variant", "arm", "seed"])["epoch"].transform("max")
    furthest = layers.groupby(["variant", "arm"])["epoch"].transform("max")
    whole = layers[reached == furthest]
    whole = whole.assign(alpha=whole["alpha"].astype(float).where(whole["tuned"]))
    keys = ["variant", "arm", "epoch", "layer"]
    averaged = whole.groupby(keys, sort=False)[["alpha"]].mean().reset_index()
    averaged["tuned"] = averaged["alpha"].notna()
    return averaged.sort_values("epoch", kind="stable", ignore_index=True)


def learning_figure(metrics: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """Return test accuracy and training loss, a line of panels per variant.

    A line is the mean of an arm over its seeds, in a band from the lowest to the
    highest. A seed that is not yet as far as the first of them is a thin line.
    """
    variants = list(dict.fromkeys(metrics["variant"]))
    figure, grid = _panels(len(variants), 2, sharey="col")
    figure.suptitle("Learning curves: mean, lowest and highest over seeds")
    columns = {"test_accuracy": "test accuracy", "train_loss": "training loss"}
    for line, variant in zip(grid, variants, strict=True):
        own = metrics[metrics["variant"] == variant]
        for axes, (column, label) in zip(line, columns.items(), strict=True):
            for number, arm in enumerate(arms):
                rows = own[own["arm"] == arm].astype({column: float})
                curves = rows.pivot(index="epoch", columns="seed", values=column)
                if curves.empty:
                    continue
                lengths, color = rows.groupby("seed")["epoch"].max(), f"C{number}"
                shorter = lengths.index[lengths < lengths.max()]
                axes.plot(curves[shorter], color=color, linewidth=0.7)
                # A loss that is not finite leaves a gap.
                whole = curves.drop(columns=shorter).to_numpy()
                band = whole.min(axis=1), whole.max(axis=1)
                axes.fill_between(curves.index, *band, color=color, alpha=0.2, lw=0)
                mean, title = whole.mean(axis=1), ARMS[arm].title
                axes.plot(curves.index, mean, color=color, label=title)
            axes.set_ylabel(label)
            axes.set_title(variant if len(variants) > 1 else "")
            _finish(axes)
        line[1].set_yscale("log")
        line[1].yaxis.set_major_formatter("{x:g}")
        line[1].yaxis.set_minor_formatter(LogFormatter())
    handles, labels = grid[0][0].get_legend_handles_labels()
    place = "outside right center"
    figure.legend(handles, labels, loc=place, fontsize="small", frameon=False)
    return figure


def alpha_figure(layers: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """Return alpha of each tuned layer: a line of panels per variant, one per arm."""
    variants = list(dict.fromkeys(layers["variant"]))
    figure, grid = _panels(len(variants), len(arms), sharey="all")
    mean = "" if "seed" in layers else ", mean over seeds"
    figure.suptitle(f"Power-law exponent of each layer while training{mean}")
    for line, variant in zip(grid, variants, strict=True):
        for axes, arm in zip(line, arms, strict=True):
            steps, (alpha,), names = _curves(layers, variant, arm, "alpha")
            plots.curves(steps, alpha, names, axes=axes)
            _finish(axes)
            name = ARMS[arm].title
            axes.set_title(f"{variant}: {name}" if len(variants) > 1 else name)
            axes.set_ylabel("alpha" if axes is line[0] else "")
    every = [axes for line in grid for axes in line]
    plots.depth_legend(figure, max(every, key=lambda axes: len(axes.lines)))
    return figure


def overview_figure(
    layers: pd.DataFrame, spectra: Mapping[str, np.ndarray], arm: str
) -> Figure:
    """Return one arm on one page: exponents, multipliers, and four spectra.

    The spectra are those of tuned layers, from the first to the last.
    """
    figure = Figure(figsize=(3.4 * PANELS, 7.6), layout="constrained")
    figure.suptitle(ARMS[arm].title)
    parts: Any = figure.subfigures(2, 1, height_ratios=[4.2, 3.4])
    top, bottom = parts
    both = top.subplots(1, 2)
    steps, values, names = _curves(layers, "base", arm, "alpha", "multiplier")
    alpha, multipliers = values
    # The last analysis is of the final weights: no epoch comes after it.
    multipliers[-1] = multipliers[-2]
    plots.training(steps, alpha, multipliers, names, axes=both)
    plots.depth_legend(top, both[0])
    titles = "Exponent of each layer while training", "Its learning-rate multiplier"
    for axes, title in zip(both, titles, strict=True):
        axes.set_title(title, fontsize="medium")
        _finish(axes)
    line = bottom.subplots(1, PANELS, sharex=True, sharey=True)
    own = layers[(layers["arm"] == arm) & layers["tuned"]]
    last = own[own["epoch"] == layers["epoch"].max()].to_dict("records")
    picks = np.linspace(0, len(last) - 1, min(len(line), len(last))).round()
    for axes, pick in zip(line, picks, strict=False):
        plots.spectrum(spectra[last[int(pick)]["layer"]], last[int(pick)], axes=axes)
    for place, axes in enumerate(line):
        axes.set(xlabel="eigenvalue λ = σ²", ylabel="" if place else "density")
        if place >= len(picks):
            axes.set_axis_off()
    return figure


def _curves(
    layers: pd.DataFrame, variant: str, arm: str, *columns: str
) -> tuple[np.ndarray, list[np.ndarray], list[str]]:
    """Return epochs, numbers of the layers ever tuned (NaN where not), and names."""
    own = layers[(layers["variant"] == variant) & (layers["arm"] == arm)]
    ever = set(own["layer"][own["tuned"]])
    names = [layer for layer in dict.fromkeys(own["layer"]) if layer in ever]
    values = []
    for column in columns:
        tuned = own.assign(value=own[column].astype(float).where(own["tuned"]))
        table = tuned.pivot(index="epoch", columns="layer", values="value")
        values.append(table[names].to_numpy(copy=True))
    return np.sort(own["epoch"].unique()), values, names


def _panels(
    lines: int, columns: int, *, sharey: Literal["col", "all"]
) -> tuple[Figure, list[list[Axes]]]:
    size = 5 * columns + 2.4, 3.8 * lines + 1
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, sharey=sharey, squeeze=False)
    return figure, [list(line) for line in grid]


def _finish(axes: Axes) -> None:
    """Give all pictures the same axis of epochs."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.margins(x=0.02)


def _save(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    paths = [directory / name for name in sorted(figures)]
    for path in paths:
        figures[path.name].savefig(path, dpi=DPI)
    return paths
