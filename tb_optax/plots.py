"""Pictures of spectra and of what the optimizer does to the layers.

Every function returns a `matplotlib.figure.Figure`: its own, or that of the `axes` it
is given. Nothing is shown or written: `figure.savefig("alpha.png")` does that. Needs
the extra `plot`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from tb_optax.checks import check_number, optional

with optional("plot"):
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.ticker import MaxNLocator, NullFormatter

__all__ = [
    "curves",
    "depth_legend",
    "heat_map",
    "layers",
    "marchenko_pastur",
    "spectrum",
    "training",
]

# Names that fit along an axis, into a legend, and into one column of it.
MOST_NAMES = 40
MOST_LINES = 52
COLUMN = 26

BOUND = "error bars: (alpha - 1)/√k for k eigenvalues in the tail, an upper bound"


def marchenko_pastur(
    values: Float[np.ndarray, " n"], aspect: float, mean: float = 1.0
) -> Float[np.ndarray, " n"]:
    r"""Return the density of eigenvalues of large random matrices.

    For a matrix of independent entries and sides n <= m, with q = n / m and
    λ± = mean·(1 ± √q)²,

        p(λ) = √((λ+ - λ)(λ - λ-)) / (2π·q·mean·λ)    between λ- and λ+, else 0.

    Args:
        values: where to evaluate it, positive.
        aspect: q, above 0 and at most 1.
        mean: of the eigenvalues: the squared Frobenius norm divided by n.

    Raises:
        ValueError: if aspect or mean are out of range.

    >>> marchenko_pastur(np.asarray([1.0, 4.0, 5.0]), 1.0).round(4).tolist()
    [0.2757, 0.0, 0.0]

    References:
        Marchenko and Pastur, `Distribution of eigenvalues for some sets of random
        matrices <https://doi.org/10.1070/SM1967v001n04ABEH001994>`_, 1967
    """
    check_number("aspect", aspect, above=0)
    check_number("mean", mean, above=0)
    if aspect > 1:
        msg = f"aspect must be at most 1, the smaller side first, got {aspect}."
        raise ValueError(msg)
    low, high = (mean * (1 + sign * math.sqrt(aspect)) ** 2 for sign in (-1, 1))
    inside = np.clip((high - values) * (values - low), 0, None)
    return np.sqrt(inside) / (2 * math.pi * aspect * mean * values)


def spectrum(
    eigenvalues: ArrayLike,
    row: Mapping[str, Any] | None = None,
    *,
    aspect: float | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Draw the spectral density of a layer, on logarithmic axes.

    The density is a histogram whose bins grow geometrically, from the lower 5 % point
    on: below it single eigenvalues spread over decades, and are not drawn.

    Args:
        eigenvalues: of one layer, ascending, as `tb_optax.esd` returns them.
        row: the layer's row of `Analysis.rows()`: draws its power law and xmin.
        aspect: smaller divided by larger side of its matrices: draws the
            Marchenko-Pastur density of the same mean, that of random matrices.
        axes: where to draw; None makes a figure.

    Raises:
        ValueError: if no eigenvalue is positive and finite, or aspect is out of range.

    >>> values = np.linalg.svd(np.random.default_rng(0).normal(size=(64, 32)))[1] ** 2
    >>> figure = spectrum(np.sort(values), aspect=0.5)
    >>> figure.axes[0].get_xlabel()
    'eigenvalue λ = σ²'
    """
    eigenvalues = np.asarray(eigenvalues, np.float64)
    values = eigenvalues[(eigenvalues > 0) & np.isfinite(eigenvalues)]
    if not values.size:
        msg = f"eigenvalues must hold a positive finite number, got {eigenvalues}."
        raise ValueError(msg)
    figure, (axes,) = _axes_or_figure(axes, (5.0, 3.8), 1)
    low = np.quantile(values, 0.05)
    bins = np.geomspace(min(low, 0.99 * values[-1]), values[-1], 31)
    bins[-1] = values[-1]
    numbers, edges = np.histogram(values, bins)
    density = numbers / (len(eigenvalues) * np.diff(edges))
    centers = np.sqrt(edges[1:] * edges[:-1])
    shown = numbers > 0
    axes.loglog(centers[shown], density[shown], "o", color="C0", markersize=3.5)
    if aspect is not None:
        where = np.geomspace(edges[0], edges[-1], 400)
        random = marchenko_pastur(where, aspect, float(eigenvalues.mean()))
        # It falls to 0 at its edges, and would squeeze the rest.
        drawn = random > density[shown].min() / 3
        axes.loglog(where[drawn], random[drawn], color="0.5", lw=1.2, label="random")
    if row is not None and row["alpha"] > 0:
        _draw_power_law(axes, row, values[-1], len(eigenvalues))
    if row is not None:
        axes.set_title(row["layer"], fontsize="medium")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", loc="lower left", frameon=False)
    for axis, name in ((axes.xaxis, "eigenvalue λ = σ²"), (axes.yaxis, "density")):
        axis.set_label_text(name)
        # Labels between the decades would run into one another.
        axis.set_minor_formatter(NullFormatter())
    return figure


def _draw_power_law(axes: Axes, row: Mapping[str, Any], top: float, count: int):
    """Draw p(λ) = (tail / N)·(alpha - 1)/xmin·(λ / xmin)^-alpha from xmin on."""
    alpha, xmin = row["alpha"], row["xmin"]
    tail = np.geomspace(xmin, max(top, xmin), 50)
    line = row["tail_size"] / count * (alpha - 1) / xmin * (tail / xmin) ** -alpha
    error = row.get("alpha_error", 0)
    label = f"alpha = {alpha:.2f}" + (f" ± {error:.2f} at most" if error else "")
    axes.loglog(tail, line, color="C1", label=label)
    axes.axvline(xmin, color="0.6", linestyle=":", label="xmin")


def layers(
    rows: Sequence[Mapping[str, Any]], *, axes: Iterable[Axes] | None = None
) -> Figure:
    """Draw alpha and multiplier of all layers, in the order of the rows.

    Where the rows have `alpha_error` and `random_alpha`, error bars and short lines
    show them. Layers that are not fitted leave a gap; those that are not tuned have
    hollow marks at multiplier 1.

    Args:
        rows: `Analysis.rows()`, from the first layer to the last.
        axes: two axes to draw into; None makes a figure.

    Raises:
        ValueError: if there is no row.

    >>> row = {"layer": "a", "alpha": 2.1, "multipliers": 0.5, "tuned": True}
    >>> [axes.get_ylabel() for axes in layers([row, row]).axes]
    ['alpha', 'multiplier']
    """
    if not rows:
        msg = "rows must hold at least one layer, got none."
        raise ValueError(msg)
    names = [row["layer"] for row in rows]
    width = min(max(5.0, 1.5 + 0.24 * len(rows)), 14.0)
    figure, (upper, lower) = _axes_or_figure(axes, (width, 6.0), 2)
    depth = np.arange(len(rows))
    alpha = _column(rows, "alpha")
    size = 5 if len(rows) <= MOST_NAMES else 3
    error = _column(rows, "alpha_error") if "alpha_error" in rows[0] else None
    upper.errorbar(depth, alpha, error, fmt="o", ms=size, elinewidth=1, label="alpha")
    if error is not None:
        upper.set_title(BOUND, fontsize="small")
    if "random_alpha" in rows[0]:
        random = _column(rows, "random_alpha")
        upper.plot(depth, random, "_", color="0.5", ms=size + 3, label="random matrix")
    multipliers = np.asarray([row["multipliers"] for row in rows], float)
    tuned = np.asarray([bool(row["tuned"]) for row in rows])
    lower.plot(depth[tuned], multipliers[tuned], "o", color="C1", ms=size)
    rest = depth[~tuned], multipliers[~tuned]
    lower.plot(*rest, "o", color="C1", mfc="none", ms=size, label="not tuned")
    lower.axhline(1, color="0.6", linestyle=":", zorder=0)
    upper.set_ylabel("alpha")
    lower.set_ylabel("multiplier")
    upper.tick_params(labelbottom=False)
    outside: Any = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    for one, needed in ((upper, "random_alpha" in rows[0]), (lower, not tuned.all())):
        if needed:
            one.legend(fontsize="small", frameon=False, **outside)
        one.grid(alpha=0.3)
        one.set_xlim(-0.7, len(rows) - 0.3)
        one.set_xticks(*_named(names))
    lower.tick_params(axis="x", labelrotation=90, labelsize="x-small")
    return figure


def curves(
    steps: ArrayLike,
    values: ArrayLike,
    names: Sequence[str],
    *,
    label: str = "alpha",
    held: bool = False,
    axes: Axes | None = None,
) -> Figure:
    """Draw one number of every layer over training, colored by depth.

    The legend is that of `depth_legend`; given `axes`, it is left to the caller.

    Args:
        steps: steps or epochs of the rows, ascending, a vector.
        values: a row per step, a column per layer in order of depth; NaN is a gap.
        names: of the layers.
        label: what the numbers are.
        held: whether a number holds until the next step, as a multiplier does.
        axes: where to draw; None makes a figure.

    Raises:
        ValueError: if the shapes do not agree.

    >>> figure = curves([0, 1], np.asarray([[2.0, 3.0], [1.9, 2.8]]), ["a", "b"])
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['a', 'b']
    """
    steps, values = _checked(steps, values, names)
    own = axes is None
    figure, (axes,) = _axes_or_figure(axes, (7.0, 4.0), 1)
    few = len(names) <= MOST_LINES
    style: Any = {
        "drawstyle": "steps-post" if held else "default",
        "linewidth": 1.5 if few else 0.7,
        "marker": "." if few and len(steps) <= 50 and not held else "",
    }
    colors = colormaps["viridis"](np.linspace(0, 0.93 if few else 1, len(names)))
    for name, column, color in zip(names, values.T, colors, strict=True):
        axes.plot(steps, column, color=color, label=name, **style)
    _name_steps(axes)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.margins(x=0.02)
    if own:
        depth_legend(figure, axes)
    return figure


def training(
    steps: ArrayLike,
    alpha: ArrayLike,
    multipliers: ArrayLike,
    names: Sequence[str],
    *,
    axes: Iterable[Axes] | None = None,
) -> Figure:
    """Draw alpha and multiplier of every layer over training, next to each other.

    Args:
        steps: steps or epochs of the rows, ascending, a vector.
        alpha: a row per step, a column per layer in order of depth; what is 0 was not
            fitted and leaves a gap.
        multipliers: the same of the multipliers, each in force until the next step.
        names: of the layers.
        axes: two axes to draw into; None makes a figure.

    Raises:
        ValueError: if the shapes do not agree.

    >>> numbers = np.asarray([[2.0, 3.0], [1.9, 2.8]])
    >>> figure = training([0, 100], numbers, numbers / 2, ["a", "b"])
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['alpha', 'multiplier']
    """
    own = axes is None
    figure, (left, right) = _axes_or_figure(axes, (11.0, 4.2), 2, side_by_side=True)
    alpha = np.asarray(alpha, float)
    curves(steps, np.where(alpha == 0, np.nan, alpha), names, axes=left)
    curves(steps, multipliers, names, label="multiplier", held=True, axes=right)
    right.axhline(1, color="0.6", linestyle=":", zorder=0)
    if own:
        depth_legend(figure, left)
    return figure


def heat_map(
    steps: ArrayLike,
    values: ArrayLike,
    names: Sequence[str],
    *,
    label: str = "alpha",
    axes: Axes | None = None,
) -> Figure:
    """Draw one number of every layer over training as colors, for deep networks.

    Args:
        steps: steps or epochs of the rows, ascending, a vector.
        values: a row per step, a column per layer in order of depth; NaN stays gray.
        names: of the layers; the first is on top.
        label: what the numbers are.
        axes: where to draw; None makes a figure.

    Raises:
        ValueError: if the shapes do not agree.

    >>> figure = heat_map([0, 10], np.asarray([[2.0, 3.0], [1.9, 2.8]]), ["a", "b"])
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['a', 'b']
    """
    steps, values = _checked(steps, values, names)
    height = min(max(3.2, 1.2 + 0.22 * len(names)), 10.0)
    figure, (axes,) = _axes_or_figure(axes, (8.0, height), 1)
    gaps = np.diff(steps) if len(steps) > 1 else np.ones(1)
    first, last = steps[0] - gaps[0] / 2, steps[-1] + gaps[-1] / 2
    edges = [first, *(steps[:-1] + steps[1:]) / 2, last]
    shown = np.ma.masked_invalid(values.T)
    axes.set_facecolor("0.85")
    image = axes.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, shown)
    axes.set_yticks(*_named(names), fontsize="x-small")
    axes.invert_yaxis()
    _name_steps(axes)
    around: Any = axes.figure
    around.colorbar(image, ax=axes, label=label)
    return figure


def depth_legend(figure: FigureBase, axes: Axes) -> None:
    """Name up to 52 lines of `axes` right of a figure, and more by a color bar."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > MOST_LINES:
        colors = ScalarMappable(Normalize(1, len(names)), colormaps["viridis"])
        every: Any = figure.axes
        figure.colorbar(colors, ax=every, label="layer, by depth")
        return
    figure.legend(
        handles,
        names,
        loc="outside right center",
        title="layer, by depth",
        fontsize="small",
        frameon=False,
        ncols=math.ceil(len(names) / COLUMN),
    )


def _axes_or_figure(
    axes: Axes | Iterable[Axes] | None,
    size: tuple[float, float],
    number: int,
    *,
    side_by_side: bool = False,
) -> tuple[Any, list[Axes]]:
    """Return the axes that are given and their figure, or those of a new one."""
    if axes is None:
        figure = Figure(figsize=size, layout="constrained")
        grid = (1, number) if side_by_side else (number, 1)
        return figure, list(figure.subplots(*grid, squeeze=False).flat)
    given = [axes] if isinstance(axes, Axes) else list(axes)
    if len(given) != number:
        msg = f"axes must be {number} matplotlib Axes, got {len(given)}."
        raise ValueError(msg)
    around: Any = given[0].figure
    return around.figure, given  # The figure of a subfigure, or itself.


def _checked(steps, values, names) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    if values.shape != (len(steps), len(names)) or not len(steps):
        msg = (
            f"values must have a row for each of {len(steps)} steps and a column for "
            f"each of {len(names)} layers, at least one row, got shape {values.shape}."
        )
        raise ValueError(msg)
    return steps, values


def _column(rows, name: str) -> np.ndarray:
    """Return a column with gaps for what is 0, since it was not fitted."""
    values = np.asarray([row[name] for row in rows], float)
    return np.where(values == 0, np.nan, values)


def _named(names: Sequence[str]) -> tuple[Sequence[int], list[str]]:
    """Return as many places and names along an axis as fit, evenly spaced."""
    places = range(0, len(names), math.ceil(len(names) / MOST_NAMES))
    return places, [names[i] for i in places]


def _name_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
