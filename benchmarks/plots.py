"""Pictures of a run, from its records and final spectra."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator, NullFormatter

from benchmarks.arms import ARMS
from benchmarks.experiment import Spectrum
from benchmarks.records import Row

DPI = 150
PANELS = 4

Spectra = Mapping[str, Sequence[Spectrum]]


def write(rows: Sequence[Row], spectra: Spectra, directory: Path) -> list[Path]:
    """Write every picture that the rows of `layers.jsonl` allow; return their paths."""
    figures = {
        "alpha.png": alpha_figure(rows, list(spectra)),
        "esd.png": esd_figure(rows, spectra),
    }
    balanced = [arm for arm in spectra if ARMS[arm].balanced]
    if balanced:
        figures["multipliers.png"] = multiplier_figure(rows, balanced)
        figures["overview.png"] = overview_figure(rows, spectra, balanced[0])
    paths = []
    for name, figure in sorted(figures.items()):
        paths.append(directory / name)
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def alpha_figure(rows: Sequence[Row], arms: Sequence[str]) -> Figure:
    """Return alpha of each tuned layer over the epochs, one panel per arm."""
    figure, panels = _panels(arms)
    figure.suptitle("Power-law exponent of each layer while training")
    for axes, arm in zip(panels, arms, strict=True):
        draw_alpha(axes, rows, arm)
        axes.set_title(ARMS[arm].title)
    for axes in panels[1:]:
        axes.set_ylabel("")
    legend(figure, panels[0])
    return figure


def multiplier_figure(rows: Sequence[Row], arms: Sequence[str]) -> Figure:
    """Return the multiplier of each tuned layer over the epochs that used it."""
    figure, panels = _panels(arms)
    figure.suptitle("Learning-rate multiplier of each layer while training")
    for axes, arm in zip(panels, arms, strict=True):
        _draw_multipliers(axes, rows, arm)
        axes.set_title(ARMS[arm].title)
    for axes in panels[1:]:
        axes.set_ylabel("")
    legend(figure, panels[0])
    return figure


def esd_figure(rows: Sequence[Row], spectra: Spectra) -> Figure:
    """Return the final spectra of four layers with their fits, one line per arm."""
    figure = Figure(
        figsize=(3.4 * PANELS, 3.2 * len(spectra) + 0.4), layout="constrained"
    )
    grid = figure.subplots(
        len(spectra), PANELS, sharex=True, sharey=True, squeeze=False
    )
    figure.suptitle("Eigenvalues of four layers after training, and the fitted tails")
    for line, (arm, own) in zip(grid, spectra.items(), strict=True):
        _draw_spectra(line, rows, arm, own)
        for axes in line:
            axes.set_title(f"{ARMS[arm].title}: {axes.get_title()}", fontsize="medium")
    for axes in grid[-1]:
        axes.set_xlabel("eigenvalue λ = σ²")
    return figure


def overview_figure(rows: Sequence[Row], spectra: Spectra, arm: str) -> Figure:
    """Return one arm on one page: exponents, multipliers, four spectra."""
    figure = Figure(figsize=(3.4 * PANELS, 7.6), layout="constrained")
    figure.suptitle(ARMS[arm].title)
    parts: Any = figure.subfigures(2, 1, height_ratios=[4.2, 3.4])
    top, bottom = parts
    left, right = top.subplots(1, 2)
    draw_alpha(left, rows, arm)
    _draw_multipliers(right, rows, arm)
    left.set_title("Exponent of each layer while training", fontsize="medium")
    right.set_title("Its learning-rate multiplier", fontsize="medium")
    legend(top, left)
    line = bottom.subplots(1, PANELS, sharex=True, sharey=True)
    _draw_spectra(line, rows, arm, spectra[arm])
    for axes in line:
        axes.set_xlabel("eigenvalue λ = σ²")
    return figure


def draw_alpha(axes: Axes, rows: Sequence[Row], arm: str) -> None:
    """Draw alpha of each tuned layer of an arm."""
    epochs, curves = _curves(rows, arm, "alpha")
    marker = "." if len(epochs) <= 50 else ""
    for (layer, values), color in zip(curves.items(), _by_depth(curves), strict=True):
        axes.plot(epochs, values, color=color, label=layer, marker=marker)
    axes.set_ylabel("alpha")
    finish(axes)


def _draw_multipliers(axes: Axes, rows: Sequence[Row], arm: str) -> None:
    epochs, curves = _curves(rows, arm, "multiplier")
    for (layer, values), color in zip(curves.items(), _by_depth(curves), strict=True):
        # The last analysis is of the final weights: no epoch follows it.
        used = [*values[:-1], values[-2]]
        axes.plot(epochs, used, color=color, label=layer, drawstyle="steps-post")
    axes.axhline(1, color="0.6", linestyle=":", zorder=0)
    axes.set_ylabel("multiplier of the learning rate")
    finish(axes)


def _draw_spectra(
    line: Sequence[Axes], rows: Sequence[Row], arm: str, spectra: Sequence[Spectrum]
) -> None:
    """Draw as many tuned layers as there are axes, from the first to the last."""
    own = [row for row in rows if row["arm"] == arm]
    fits = {
        row["layer"]: row
        for row in own
        if row["tuned"] and row["epoch"] == own[-1]["epoch"]
    }
    tuned = [spectrum for spectrum in spectra if spectrum.layer in fits]
    picks = np.linspace(0, len(tuned) - 1, min(len(line), len(tuned))).round()
    for axes, pick in zip(line, picks, strict=False):
        spectrum = tuned[int(pick)]
        _draw_spectrum(axes, spectrum, fits[spectrum.layer])
        axes.set_title(spectrum.layer, fontsize="medium")
    for axes in line[len(picks) :]:
        axes.set_axis_off()
    line[0].set_ylabel("density")


def _draw_spectrum(axes: Axes, spectrum: Spectrum, fit: Row) -> None:
    values = spectrum.eigenvalues[spectrum.eigenvalues > 0]
    count = len(spectrum.eigenvalues)
    # The smallest spread over decades, one to a bin: they would squeeze the rest.
    bins = np.geomspace(np.quantile(values, 0.05), values[-1], 31)
    numbers, edges = np.histogram(values, bins)
    density = numbers / (count * np.diff(edges))
    centres = np.sqrt(edges[1:] * edges[:-1])
    shown = numbers > 0
    axes.loglog(centres[shown], density[shown], "o", color="C0", markersize=3.5)
    alpha, xmin, share = fit["alpha"], fit["xmin"], fit["tail_size"] / count
    tail = np.geomspace(xmin, values[-1], 50)
    line = share * (alpha - 1) / xmin * (tail / xmin) ** -alpha
    axes.loglog(tail, line, color="C1", label=f"alpha = {alpha:.2f}")
    axes.axvline(xmin, color="0.6", linestyle=":", label="xmin")
    axes.legend(fontsize="small", loc="lower left", frameon=False)
    # Labels between the decades would run into one another.
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curves(
    rows: Sequence[Row], arm: str, column: str
) -> tuple[list[int], dict[str, list[float]]]:
    """Return the epochs and the layers ever tuned; NaN where one is not."""
    own = [row for row in rows if row["arm"] == arm]
    epochs = list(dict.fromkeys(row["epoch"] for row in own))
    tuned = {row["layer"] for row in own if row["tuned"]}
    curves: dict[str, list[float]] = {}
    for row in own:
        if row["layer"] in tuned:
            value = row[column] if row["tuned"] else np.nan
            curves.setdefault(row["layer"], []).append(value)
    return epochs, curves


def _by_depth(layers: Mapping[str, object]) -> np.ndarray:
    return colormaps["viridis"](np.linspace(0, 0.93, len(layers)))


def _panels(arms: Sequence[str]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5 * len(arms) + 2.4, 4.8), layout="constrained")
    grid = figure.subplots(1, len(arms), sharey=True, squeeze=False)
    return figure, list(grid[0])


def finish(axes: Axes) -> None:
    """Make the axis of epochs what it is in all pictures."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.margins(x=0.02)


def legend(figure: FigureBase, axes: Axes) -> None:
    """Name the layers beside the panels."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside right center",
        title="layer, by depth",
        fontsize="small",
        frameon=False,
        ncols=1 + len(names) // 26,
    )
