"""Pictures of a comparison: learning curves and exponents, over all seeds."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks import plots, records
from benchmarks.arms import ARMS
from benchmarks.comparison import Comparison
from benchmarks.records import Row

# The rows of each seed of a variant.
BySeed = Mapping[int, Sequence[Row]]


def write(comparison: Comparison) -> list[Path]:
    """Write every picture that the runs so far allow; return their paths."""
    metrics = _read(comparison, "metrics")
    layers = _read(comparison, "layers")
    arms = comparison.arms
    figures = {}
    if any(rows for by_seed in metrics.values() for rows in by_seed.values()):
        figures["learning.png"] = learning_figure(metrics, arms)
    shown = dict.fromkeys([arms[0], *(arm for arm in arms if ARMS[arm].balanced)])
    averaged = {variant: average(by_seed) for variant, by_seed in layers.items()}
    if any(averaged.values()):
        figures["alpha.png"] = alpha_figure(averaged, list(shown)[:2])
    paths = []
    for name, figure in figures.items():
        paths.append(comparison.path / name)
        figure.savefig(paths[-1], dpi=plots.DPI)
    return paths


def learning_figure(metrics: Mapping[str, BySeed], arms: Sequence[str]) -> Figure:
    """Return test accuracy and training loss, a line of panels per variant.

    A line is the mean of an arm over its seeds, in a band from the lowest to the
    highest.  A seed that is not yet as far as the first of them is a thin line.
    """
    figure, grid = _panels(len(metrics), 2, sharey="col")
    figure.suptitle("Learning curves: mean, lowest and highest over seeds")
    for line, (variant, by_seed) in zip(grid, metrics.items(), strict=True):
        for number, arm in enumerate(arms):
            color = f"C{number}"
            _draw_curves(line[0], by_seed.values(), arm, "test_accuracy", color)
            _draw_curves(line[1], by_seed.values(), arm, "train_loss", color)
        line[0].set_ylabel("test accuracy")
        line[1].set_ylabel("training loss")
        line[1].set_yscale("log")
        line[1].yaxis.set_major_formatter("{x:g}")
        line[1].yaxis.set_minor_formatter(LogFormatter())
        for axes in line:
            plots.finish(axes)
            if len(metrics) > 1:
                axes.set_title(variant)
    figure.legend(
        *grid[0][0].get_legend_handles_labels(),
        loc="outside right center",
        fontsize="small",
        frameon=False,
    )
    return figure


def alpha_figure(layers: Mapping[str, Sequence[Row]], arms: Sequence[str]) -> Figure:
    """Return alpha of each tuned layer over the epochs, a line of panels per variant.

    Args:
        layers: rows of each variant, averaged over its seeds.
        arms: one panel each.
    """
    figure, grid = _panels(len(layers), len(arms), sharey="all")
    figure.suptitle("Power-law exponent of each layer, mean over seeds")
    for line, (variant, rows) in zip(grid, layers.items(), strict=True):
        for axes, arm in zip(line, arms, strict=True):
            plots.draw_alpha(axes, rows, arm)
            title = f"{variant}: {ARMS[arm].title}"
            axes.set_title(title if len(layers) > 1 else ARMS[arm].title)
        for axes in line[1:]:
            axes.set_ylabel("")
    most = max(
        (axes for line in grid for axes in line),
        key=lambda axes: len(axes.get_legend_handles_labels()[1]),
    )
    plots.legend(figure, most)
    return figure


def average(by_seed: BySeed) -> list[Row]:
    """Average the rows of `layers.jsonl` over the seeds of an arm that are furthest.

    A layer is tuned if it is for one of them, and its alpha is the mean of those it is
    tuned for.
    """
    furthest: dict[str, int] = {}
    for row in itertools.chain(*by_seed.values()):
        furthest[row["arm"]] = max(row["epoch"], furthest.get(row["arm"], 0))
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for rows in by_seed.values():
        reached = {(row["arm"], row["epoch"]) for row in rows}
        for row in rows:
            arm = row["arm"]
            if (arm, furthest[arm]) in reached:
                groups.setdefault((arm, row["epoch"], row["layer"]), []).append(row)
    averaged = []
    for (arm, epoch, layer), rows in sorted(
        groups.items(), key=lambda item: item[0][1]
    ):
        alphas = [
            row["alpha"] for row in rows if row["tuned"] and row["alpha"] is not None
        ]
        row = {"arm": arm, "epoch": epoch, "layer": layer, "tuned": bool(alphas)}
        averaged.append(row | {"alpha": float(np.mean(alphas)) if alphas else None})
    return averaged


def _read(comparison: Comparison, name: str) -> dict[str, BySeed]:
    return {
        variant: {
            seed: records.read(getattr(comparison.directory(variant, seed), name))
            for seed in comparison.seeds
        }
        for variant in comparison.configs
    }


def _draw_curves(
    axes: Axes, runs: Iterable[Sequence[Row]], arm: str, column: str, color: str
) -> None:
    curves = []
    for rows in runs:
        values = [row[column] for row in rows if row["arm"] == arm]
        # A loss that is not finite leaves a gap.
        curves.append([np.nan if value is None else value for value in values])
    longest = max(map(len, curves), default=0)
    if not longest:
        return
    whole = [curve for curve in curves if len(curve) == longest]
    for curve in curves:
        if len(curve) < longest:
            axes.plot(range(1, len(curve) + 1), curve, color=color, linewidth=0.7)
    epochs = range(1, longest + 1)
    low, high = np.min(whole, axis=0), np.max(whole, axis=0)
    axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(epochs, np.mean(whole, axis=0), color=color, label=ARMS[arm].title)


def _panels(
    lines: int, columns: int, *, sharey: Literal["col", "all"]
) -> tuple[Figure, list[list[Axes]]]:
    size = 5 * columns + 2.4, 3.8 * lines + 0.8
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, sharey=sharey, squeeze=False)
    return figure, [list(line) for line in grid]
