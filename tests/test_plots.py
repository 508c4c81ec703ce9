"""What the pictures show, not how they look."""

import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest

import tb_optax
from tb_optax import plots

RNG = np.random.default_rng(0)


def rows(number):
    """Rows of a table: the second is not fitted, the third not tuned."""
    table = [
        {
            "layer": f"layer{i}",
            "alpha": 2 + i / 10,
            "alpha_error": 0.2,
            "random_alpha": 2.5,
            "xmin": 1.0,
            "tail_size": 16,
            "multipliers": 1.2,
            "tuned": True,
        }
        for i in range(number)
    ]
    table[1] |= {"alpha": 0.0, "alpha_error": 0.0, "multipliers": 1.0, "tuned": False}
    table[2] |= {"multipliers": 1.0, "tuned": False}
    return table


def points(line):
    """The numbers that a line goes through."""
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


@pytest.mark.parametrize("aspect", [1.0, 0.5, 0.1])
def test_the_random_density_is_that_of_random_matrices(aspect):
    n = 300
    kernel = RNG.normal(size=(n, round(n / aspect)))
    eigenvalues = np.linalg.svd(kernel, compute_uv=False) ** 2
    mean = eigenvalues.mean()
    edges = np.linspace(0, 1.02 * eigenvalues.max(), 4001)
    middles = (edges[1:] + edges[:-1]) / 2
    density = plots.marchenko_pastur(middles, aspect, mean)
    below = np.cumsum(density) * np.diff(edges)
    assert below[-1] == pytest.approx(1, abs=0.02)
    found = np.searchsorted(np.sort(eigenvalues), middles) / n
    # At q = 1 the density is infinite at 0, where the sum is coarse.
    np.testing.assert_allclose(below, found, atol=0.03)


def test_a_spectrum_has_the_fit_of_the_analysis():
    eigenvalues = (1 - (np.arange(4000) + 0.5) / 4000) ** (-1 / 1.5)
    logs = jnp.log(eigenvalues)[None]
    law = tb_optax.fit_median()(logs, jnp.ones_like(logs, bool))
    row = {"layer": "a", "alpha": law.alpha.item(), "xmin": law.xmin.item()}
    figure = plots.spectrum(eigenvalues, row | {"tail_size": 2000}, aspect=0.5)
    found, random, line, _ = figure.axes[0].lines
    assert (random.get_label(), line.get_label()) == (
        "random",
        f"alpha = {row['alpha']:.2f}",
    )
    # The line lies on the points of the tail.
    x, y = points(found)
    line_x, line_y = points(line)
    tail = (x > 1.1 * row["xmin"]) & (x < 20)
    fitted = np.interp(np.log(x[tail]), np.log(line_x), np.log(line_y))
    np.testing.assert_allclose(np.log(y[tail]), fitted, atol=0.2)


@pytest.mark.parametrize("number", [5, 300])
def test_layers_that_are_not_fitted_or_tuned_can_be_told(number):
    upper, lower = plots.layers(rows(number)).axes
    alphas = points(upper.lines[0])[1]
    assert np.flatnonzero(np.isnan(alphas)).tolist() == [1]
    assert "upper bound" in upper.get_title()
    tuned, rest, _ = lower.lines
    assert len(points(tuned)[0]) == number - 2
    assert points(rest)[0].tolist() == [1, 2]
    names = [text.get_text() for text in lower.get_xticklabels()]
    assert names[0] == "layer0"
    assert len(names) == min(number, 38)


def test_no_error_is_drawn_where_the_table_has_none():
    plain = [{k: v for k, v in row.items() if k != "alpha_error"} for row in rows(5)]
    assert plots.layers(plain).axes[0].get_title() == ""


@pytest.mark.parametrize("number", [5, 300])
def test_training_has_a_line_per_layer(number):
    steps = [0, 10, 30]
    alpha = RNG.uniform(1.5, 4, (3, number))
    alpha[0, 0] = 0
    names = [f"layer{i}" for i in range(number)]
    figure = plots.training(steps, alpha, alpha / 2, names)
    left, right, *bar = figure.axes
    assert len(left.lines) == number
    assert np.isnan(points(left.lines[0])[1]).tolist() == [True, False, False]
    assert right.lines[0].get_drawstyle() == "steps-post"
    assert (len(bar) == 1) == (number > plots.MOST_LINES) == (not figure.legends)
    image = plots.heat_map(steps, alpha, names).axes[0].collections[0]
    shown = np.asarray(image.get_array()).reshape(number, 3)
    np.testing.assert_allclose(shown, alpha.T)


@pytest.mark.parametrize(
    ("draw", "number"),
    [
        (lambda axes: plots.spectrum(np.ones(3), axes=axes), 1),
        (lambda axes: plots.layers(rows(5), axes=axes), 2),
        (lambda axes: plots.curves([0], np.ones((1, 2)), "ab", axes=axes), 1),
        (lambda axes: plots.heat_map([0], np.ones((1, 2)), "ab", axes=axes), 1),
        (
            lambda axes: plots.training(
                [0], np.ones((1, 2)), np.ones((1, 2)), "ab", axes=axes
            ),
            2,
        ),
    ],
)
def test_pictures_can_be_drawn_into_axes(draw, number, tmp_path):
    figure = matplotlib.figure.Figure()
    axes = figure.subplots(1, 2)
    assert draw(axes if number == 2 else axes[0]) is figure
    assert all(one.has_data() for one in axes[:number])
    figure.savefig(tmp_path / "picture.png")
    draw(None).savefig(tmp_path / "own.png")
    if number == 2:
        with pytest.raises(ValueError, match="axes must be 2 matplotlib Axes, got 3"):
            draw([*axes, axes[0]])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.spectrum(np.zeros(3)), "must hold a positive finite number"),
        (lambda: plots.spectrum(np.ones(3), aspect=2.0), "aspect must be at most 1"),
        (lambda: plots.marchenko_pastur(np.ones(1), 0.0), "aspect must be a finite"),
        (lambda: plots.layers([]), "at least one layer"),
        (lambda: plots.curves([0], np.ones((2, 2)), "ab"), r"got shape \(2, 2\)"),
        (lambda: plots.heat_map([], np.ones((0, 2)), "ab"), r"got shape \(0, 2\)"),
    ],
)
def test_what_cannot_be_drawn(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
