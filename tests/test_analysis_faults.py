"""What no power law fits: kernels gone bad, and functions of the user gone wrong."""

import dataclasses
import functools
import math
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import spectra
from layer_table import (
    DENSE,
    EXPANDED,
    LAYERS,
    analysis_of,
    analyze,
    assert_same,
    check_table,
    columns_of,
    make_kernels,
)
from spectra import eps_of, float32

import tb_optax
from tb_optax import (
    Layer,
    MatrixAxes,
    PowerLaw,
    fit_median,
    fit_min_ks,
    fit_peak,
    layer_analysis,
    linear,
    log2,
    sqrt,
    step,
)

SQUARE = [layer.name for layer in EXPANDED].index("square")
OTHERS = np.arange(len(EXPANDED)) != SQUARE


def with_square(make, dtype=np.float32):
    """The zoo with another kernel in the place of its square one."""
    kernels = make_kernels(0)
    old = kernels["square"]
    kernels["square"] = np.asarray(make(np.random.default_rng(1), old), dtype)
    return kernels


def put(value):
    def make(_, kernel):
        kernel = kernel.copy()
        kernel[..., 17, 30] = value
        return kernel

    return make


def of_rank(keep):
    def make(rng, kernel):
        sigma = np.linspace(1, 3, keep)
        return spectra.with_singular_values(rng, sigma, *kernel.shape)

    return make


# Two stacks make a table of six rows that compiles fast.
STACK = MatrixAxes((1,), (2,), stacked=(0,))
SIX = (Layer("fifty", STACK), Layer("thirty", STACK))
COUNTS = np.asarray([50] * 3 + [30] * 3)


def make_six(seed):
    """Three kernels of 50 eigenvalues, three of 30, with heavy tails."""
    rng = np.random.default_rng(seed)
    return {
        "fifty": float32(rng.standard_t(3, size=(3, 60, 50))),
        "thirty": float32(rng.standard_t(3, size=(3, 30, 40))),
    }


@functools.cache
def analysis_of_six(**options: Any):
    options.setdefault("min_eigenvalues", 20)
    return layer_analysis(SIX, **options)


BAD = {
    "nan": put(math.nan),
    "inf": put(math.inf),
    "-inf": put(-math.inf),
    "all nan": lambda _, kernel: kernel * math.nan,
    "zero": lambda _, kernel: kernel * 0,
    "one entry": lambda _, kernel: put(3.0)(None, kernel * 0),
    "constant": lambda _, kernel: np.full_like(kernel, -0.3),
    "rank one": of_rank(1),
    "rank two": of_rank(2),
    "orthogonal": lambda rng, kernel: spectra.orthonormal(rng, *kernel.shape),
    "identity": lambda _, kernel: 1e-20 * np.eye(len(kernel)),
}
ROUTES = {"gram": fit_median(), "singular values": fit_min_ks()}


def check_not_fitted(analysis, row):
    """Zeros, no multiplier, and nothing that is not finite."""
    columns = columns_of(analysis)
    for name in ("alpha", "alpha_hat", "ks_distance", "xmin", "tail_size"):
        assert columns[name][row] == 0, name
    assert not columns["fitted"][row]
    assert not columns["tuned"][row]
    assert columns["multipliers"][row] == 1
    for name, column in columns.items():
        assert np.isfinite(column).all(), name


@pytest.mark.parametrize("route", ROUTES)
def test_bad_kernels_are_not_fitted_and_touch_no_other_layer(route):
    fit = ROUTES[route]
    healthy = analyze(with_square(lambda _, kernel: kernel), fit=fit)
    assert np.asarray(healthy.tuned).any()
    alone = None
    for name, make in BAD.items():
        kernels = with_square(make)
        analysis = analyze(kernels, fit=fit)
        check_not_fitted(analysis, SQUARE)
        if name in ("nan", "inf", "-inf", "all nan", "zero"):
            for column in ("spectral_norm", "frobenius_norm", "stable_rank"):
                assert getattr(analysis, column)[SQUARE] == 0
        else:
            top = np.linalg.norm(kernels["square"].astype(np.float64), 2)
            assert analysis.spectral_norm[SQUARE] == pytest.approx(
                top, rel=84 * eps_of(np.float32)
            )
        # To the bit: but for the map, also as beside a healthy kernel.
        fits = set(columns_of(analysis)) - {"multipliers"}
        assert_same(analysis, healthy, fits, rows=OTHERS)
        alone = alone or analysis
        assert_same(analysis, alone, rows=OTHERS)
    without = layer_analysis(
        [layer for layer in LAYERS if layer.path != "square"],
        fit=fit,
        min_eigenvalues=20,
    )(kernels)
    for name, column in columns_of(without).items():
        np.testing.assert_array_equal(
            column, columns_of(alone)[name][OTHERS], err_msg=name
        )


def test_no_nan_on_the_way():
    """Debugging for NaN stays quiet where kernels are bad, each in its own way."""
    kernels = make_six(2)
    kernels["fifty"][0] = math.nan
    kernels["fifty"][1] = np.eye(60, 50)
    kernels["fifty"][2, 4, 4] = math.inf
    kernels["thirty"][0] = 0
    kernels["thirty"][1] = 0.5
    with jax.debug_nans(True):
        analysis = jax.block_until_ready(analysis_of_six(assign=log2())(kernels))
    for row in range(5):
        check_not_fitted(analysis, row)
    assert analysis.tuned[5]


@pytest.mark.parametrize("keep", [23, 24, 25, 26])
@pytest.mark.parametrize("scale", [1e-30, 1, 1e30])
def test_half_rank(keep, scale):
    """Of 50 eigenvalues 25 are the tail: with fewer nonzero ones, xmin is noise."""
    kernels = with_square(lambda rng, old: scale * of_rank(keep)(rng, old))
    analysis = analyze(kernels)
    if keep < 25:
        check_not_fitted(analysis, SQUARE)
        return
    assert analysis.fitted[SQUARE]
    expected = spectra.hill(np.linspace(1, 3, keep) ** 2, 25)
    tolerance = 168 * eps_of(np.float32)
    assert analysis.alpha[SQUARE] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("route", ROUTES)
def test_noise_of_larger_matrices(route):
    """The rounding noise of a rank-deficient kernel is no spectrum at any size."""
    rng = np.random.default_rng(3)
    size = 256
    made = {
        "low": spectra.with_singular_values(rng, np.linspace(1, 2, 120), size, size),
        "one": np.outer(rng.normal(size=size), rng.normal(size=size)),
        "constant": np.full((size, size), 0.1),
        "orthogonal": spectra.orthonormal(rng, size, size),
    }
    params = {name: jnp.asarray(kernel, jnp.float32) for name, kernel in made.items()}
    layers = [Layer(name, DENSE) for name in params]
    analysis = layer_analysis(layers, fit=ROUTES[route])(params)
    for row, layer in enumerate(analysis.layers):
        if (route, layer.path) == ("singular values", "low"):
            # Its best tail may lie among the 120: then it is a true one.
            assert not analysis.fitted[row] or analysis.tail_size[row] <= 120
        else:
            check_not_fitted(analysis, row)


def test_only_bad_layers():
    """Nothing to tune: every multiplier is 1."""
    kernels = {name: np.zeros_like(kernel) for name, kernel in make_kernels(0).items()}
    analysis = analyze(kernels)
    for row in range(len(EXPANDED)):
        check_not_fitted(analysis, row)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_only_columns_in_units_of_eigenvalues_overflow(scale):
    kernels = {
        name: float32(kernel * scale) for name, kernel in make_kernels(4).items()
    }
    for fit in (fit_median(), fit_peak()):
        columns = columns_of(analyze(kernels, fit=fit))
        usual = columns_of(analyze(make_kernels(4), fit=fit))
        if fit == fit_median():
            np.testing.assert_array_equal(columns["fitted"], usual["fitted"])
            lost = np.inf if scale > 1 else 0
            np.testing.assert_array_equal(columns["xmin"][usual["fitted"]], lost)
        del columns["xmin"]
        for name, column in columns.items():
            assert np.isfinite(column).all(), name


# --- who is tuned -------------------------------------------------------------------


@pytest.mark.parametrize("least", [0, 30, 31, 50, 51])
def test_small_spectra_are_fitted_but_not_tuned(least):
    tuned = least <= COUNTS
    none = "no layer reaches min_eigenvalues = 51: all 6 have 30 to 50 eigenval"
    with nullcontext() if tuned.any() else pytest.warns(UserWarning, match=none):
        analysis = analysis_of_six(min_eigenvalues=least)(make_six(5))
    assert analysis.fitted.all()
    np.testing.assert_array_equal(analysis.tuned, tuned)
    np.testing.assert_array_equal(analysis.multipliers[~tuned], 1)
    if tuned.any():
        assert np.asarray(analysis.multipliers).min() == 0.5
        assert np.asarray(analysis.multipliers).max() == pytest.approx(1.5)


def test_untuned_layers_do_not_move_the_range():
    """The kernels of N = 30 get by far the heaviest tails of all."""
    kernels = make_six(6)
    changed = dict(kernels, thirty=kernels["thirty"] ** 5)
    analyze = analysis_of_six(min_eigenvalues=31)
    before, after = analyze(kernels), analyze(changed)
    assert (after.alpha[3:] < after.alpha[:3].min()).all()
    assert (after.alpha[3:] != before.alpha[3:]).all()
    assert_same(before, after, ("multipliers", "tuned"))


def test_one_layer_and_equal_layers_stay_untouched():
    kernels = make_kernels(7)
    layers = [Layer("dense", DENSE)]
    with pytest.warns(UserWarning, match="'dense' with 50 .* there is no other layer"):
        analysis = layer_analysis(layers)(kernels)
    assert analysis.tuned.all()
    assert (analysis.multipliers == 1).all()
    twins = {"a": kernels["dense"], "b": kernels["dense"]}
    analysis = layer_analysis([Layer(name, DENSE) for name in twins])(twins)
    assert analysis.tuned.all()
    assert (analysis.multipliers == 1).all()


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric with given numbers."""

    numbers: tuple[float, ...]

    def __call__(self, analysis):
        """The numbers, whatever the analysis."""
        assert isinstance(analysis, tb_optax.Analysis)
        return jnp.asarray(self.numbers, analysis.alpha.dtype)


@pytest.mark.parametrize(
    ("assign", "outside"),
    [(log2(), 0.5), (sqrt(), -0.5), (linear(), math.nan), (step(), math.inf)],
    ids=repr,
)
def test_outside_the_domain_of_the_map(assign, outside):
    """Multiplier 1, not tuned, no part in the others' sum: as if it were not there."""
    numbers = np.linspace(2, 5, 6)
    numbers[4] = outside
    metric = Column(tuple(numbers))
    analysis = analysis_of_six(assign=assign, metric=metric)(make_six(8))
    assert analysis.fitted.all()
    inside = np.arange(6) != 4
    np.testing.assert_array_equal(analysis.tuned, inside)
    assert analysis.multipliers[4] == 1
    scores = jnp.asarray(numbers[inside], jnp.float32)
    np.testing.assert_allclose(
        analysis.multipliers[inside],
        assign(scores, jnp.ones(5, bool)),
        rtol=6 * eps_of(np.float32),
    )


METRICS = (
    "alpha",
    "alpha_hat",
    "ks_distance",
    "xmin",
    "tail_size",
    "eigenvalue_count",
    "spectral_norm",
    "frobenius_norm",
    "stable_rank",
)


@pytest.mark.parametrize("metric", METRICS)
def test_any_column_may_be_the_metric(metric):
    analysis = jax.eval_shape(analysis_of_six(metric=metric), make_six(9))
    assert analysis.multipliers == jax.ShapeDtypeStruct((6,), jnp.float32)


@pytest.mark.parametrize("metric", ["stable_rank", "ks_distance", "eigenvalue_count"])
def test_columns_as_metrics(metric):
    analysis = analysis_of_six(metric=metric)(make_six(9))
    assert analysis.tuned.all()
    column = np.asarray(getattr(analysis, metric), np.float64)
    np.testing.assert_allclose(
        analysis.multipliers,
        0.5 + (column - column.min()) / np.ptp(column),
        atol=4 * eps_of(np.float32) * (1 + np.abs(column).max() / np.ptp(column)),
    )


# --- functions of the user ----------------------------------------------------------


def test_fit_of_the_user():
    """It sees ascending rows, padding first, in the unit of their own kernel."""
    kernels = make_kernels(10)

    def largest_over_third(log_eigenvalues, valid):
        """Alpha from the largest and the third largest λ; 0 where there is none."""
        third = log_eigenvalues[:, -3]
        some = valid[:, -3]
        return PowerLaw(
            alpha=jnp.where(some, 1 + log_eigenvalues[:, -1] - third, 0),
            xmin=jnp.where(some, jnp.exp(third), 0),
            ks_distance=jnp.zeros(len(valid)),
            tail_size=jnp.where(some, 3, 0),
        )

    analysis = analyze(kernels, fit=largest_over_third)
    for row, layer in zip(analysis.rows(), analysis.layers, strict=True):
        eigenvalues = spectra.eigenvalues_of(kernels[layer.path], layer)
        assert row["fitted"] == (len(eigenvalues) >= 3)
        if row["fitted"]:
            ratio = math.log(eigenvalues[-1] / eigenvalues[-3])
            # Both λ are at least a hundredth of λ_max.
            assert eigenvalues[-3] > eigenvalues[-1] / 100
            tolerance = 100 * 8.4 * eps_of(np.float32) * math.sqrt(50)
            assert row["alpha"] == pytest.approx(1 + ratio, abs=tolerance)
            assert row["xmin"] == pytest.approx(eigenvalues[-3], rel=tolerance)


@pytest.mark.parametrize(
    "alphas",
    [
        (math.nan, 2.0, math.inf, 3.0, -math.inf, 1e4),
        (0.0, 2.0, -2.0, 3.0, 1.1e4, 1e-3),
    ],
    ids=str,
)
def test_alpha_that_cannot_be_trusted(alphas):
    """From any fit: NaN, infinite, above 1e4, or not positive."""

    def fit(log_eigenvalues, valid):
        law = fit_median()(log_eigenvalues, valid)
        return law._replace(alpha=jnp.asarray(alphas, jnp.float32))

    analysis = analysis_of_six(fit=fit)(make_six(11))
    for row in (0, 2, 4):
        check_not_fitted(analysis, row)
    good = slice(1, 6, 2)
    np.testing.assert_array_equal(analysis.alpha[good], float32(alphas[good]))
    assert analysis.tuned[good].all()
    expected = reference.multipliers(
        np.asarray(alphas[good]), "tb_linear_map", 0.5, 1.5
    )
    np.testing.assert_allclose(
        analysis.multipliers[good], expected, rtol=4 * eps_of(np.float32)
    )


@pytest.mark.parametrize("field", PowerLaw._fields)
def test_fit_of_the_wrong_shape(field):
    def fit(log_eigenvalues, valid):
        law = fit_median()(log_eigenvalues, valid)
        return law._replace(**{field: getattr(law, field)[:-1]})

    with pytest.raises(ValueError, match="fit") as error:
        analyze(make_kernels(0), fit=fit)
    for word in (field, f"({len(EXPANDED)},)", f"({len(EXPANDED) - 1},)"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["metric", "assign"])
@pytest.mark.parametrize("shape", [(), (len(EXPANDED), 1), (3,)], ids=str)
def test_functions_of_the_wrong_shape(name, shape):
    with pytest.raises(ValueError, match=f"{name} must return shape") as error:
        analyze(make_kernels(0), **{name: lambda *_: jnp.ones(shape)})
    assert f"({len(EXPANDED)},)" in str(error.value)
    assert str(shape) in str(error.value)


def test_map_of_the_user():
    """It sees scores of 1 for what is not tuned, and cannot tune it either."""

    def assign(metric, tuned):
        return jnp.where(tuned, metric / 2, 7) + jnp.where(metric == 1, 0.0, 1.0)

    analysis = analysis_of_six(assign=assign, min_eigenvalues=31)(make_six(12))
    tuned = COUNTS == 50
    np.testing.assert_array_equal(analysis.tuned, tuned)
    np.testing.assert_array_equal(analysis.multipliers[~tuned], 1)
    np.testing.assert_array_equal(
        analysis.multipliers[tuned], np.asarray(analysis.alpha)[tuned] / 2 + 1
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "aplha"}, ["metric", "'aplha'", "alpha_hat"]),
        ({"metric": "multipliers"}, ["metric", "'multipliers'"]),
        ({"min_eigenvalues": -1}, ["min_eigenvalues", ">= 0", "-1"]),
        ({"max_dim": 0}, ["max_dim", ">= 1", "0"]),
        ({"conv_norm": 0.0}, ["conv_norm", "> 0", "0.0"]),
        ({"conv_norm": math.inf}, ["conv_norm", "inf"]),
        ({"eigenvalue_floor": 0.0}, ["eigenvalue_floor", "> 0", "0.0"]),
        ({"eigenvalue_floor": math.nan}, ["eigenvalue_floor", "nan"]),
    ],
    ids=str,
)
def test_options_are_checked_at_construction(options, words):
    with pytest.raises(ValueError, match="must be") as error:
        layer_analysis(LAYERS, **options)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (np.ones((4, 4), np.int32), ["'w'", "int32", "floating"]),
        (np.ones((0, 4), np.float32), ["'w'", "(0, 4)", "empty"]),
        (np.ones((4, 4), np.complex64), ["'w'", "complex64", "floating"]),
    ],
    ids=["integer", "empty", "complex"],
)
def test_kernels_without_a_spectrum(kernel, words):
    with pytest.raises(ValueError, match="a kernel must be floating and not") as error:
        layer_analysis([Layer("w", DENSE)])({"w": jnp.asarray(kernel)})
    for word in words:
        assert word in str(error.value)


def test_no_layer_at_all():
    for layers, params in (([], make_kernels(0)), (None, {"b": jnp.ones(3)})):
        with pytest.raises(ValueError, match="there is no layer to balance"):
            layer_analysis(layers)(params)


# --- under transformations ----------------------------------------------------------


def test_inside_jit_equals_outside():
    kernels = make_six(13)
    analysis = analysis_of_six()(kernels)
    inside = jax.jit(lambda params: analysis_of_six()(params))(kernels)
    assert inside.layers == analysis.layers
    assert_same(inside, analysis)


def test_vmap_over_trees_of_parameters():
    trees = [make_six(seed) for seed in (14, 15, 16)]
    trees[1]["fifty"][1] = math.nan
    batch = jax.tree.map(lambda *kernels: jnp.stack(kernels), *trees)
    analyses = jax.vmap(analysis_of_six())(batch)
    for i, tree in enumerate(trees):
        analysis = jax.tree.map(lambda column, i=i: column[i], analyses)
        alone = analysis_of_six()(tree)
        assert analysis.layers == alone.layers
        for name, column in columns_of(alone).items():
            np.testing.assert_allclose(
                columns_of(analysis)[name], column, rtol=84 * eps_of(np.float32)
            )
        if i != 1:
            check_table(analysis, tree, reference.fit_median)


def test_layers_without_work():
    kernels = make_kernels(17)
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, kernels))
    analysis = jax.eval_shape(analysis_of(), abstract)
    assert analysis.layers == EXPANDED
    assert analysis.alpha == jax.ShapeDtypeStruct((len(EXPANDED),), jnp.float32)


def test_equal_analyses_share_one_compilation():
    """By the value of their options; a fit counts how often it is traced."""
    traces = []

    @dataclasses.dataclass(frozen=True)
    class Counted:
        position: float = 2

        def __call__(self, log_eigenvalues, valid):
            traces.append(self.position)
            return fit_median(self.position)(log_eigenvalues, valid)

    def make(**options):
        layers = [Layer("dense", DENSE), Layer("wide", DENSE)]
        return layer_analysis(layers, fit=Counted(), **options)

    one, other = make(), make(assign=linear(0.5, 1.5), metric="alpha")
    assert one == other
    assert hash(one) == hash(other)
    for seed in (18, 19):
        one(make_kernels(seed))
        other(make_kernels(seed))
    assert traces == [2]
    # The tree around the kernels, their names apart, has no part in it.
    one({**make_kernels(20), "more": jnp.ones(3)})
    assert traces == [2]
    changed = make(assign=linear(0.5, 1.4))
    assert changed != one
    changed(make_kernels(18))
    assert traces == [2, 2]


# --- what the table is for ----------------------------------------------------------


def test_rows_are_plain():
    rows = analyze(make_kernels(21)).rows()
    assert [row["layer"] for row in rows] == [layer.name for layer in EXPANDED]
    assert {type(value) for row in rows for value in row.values()} == {
        str,
        float,
        int,
        bool,
    }


def test_leaf_multipliers_have_the_tree_of_the_parameters():
    kernels = make_kernels(22)
    layers = [
        Layer("a/w", LAYERS[4].axes, ("a/b",)),
        Layer("c/w", DENSE, ("c/b", "c/masked")),
    ]
    params = {
        "a": {"w": kernels["scan"], "b": np.zeros((2, 50), np.float32)},
        "c": {"w": kernels["dense"], "b": np.zeros(50, np.float32), "masked": None},
        "norm": np.ones(7, np.float32),
    }
    analysis = layer_analysis(layers, min_eigenvalues=2)(params)
    multipliers = analysis.leaf_multipliers(params)
    first, second, dense = analysis.multipliers
    assert jax.tree.structure(multipliers) == jax.tree.structure(params)
    stacked = np.asarray([first, second])
    np.testing.assert_array_equal(multipliers["a"]["w"].ravel(), stacked)
    np.testing.assert_array_equal(multipliers["a"]["b"].ravel(), stacked)
    for leaf in ("w", "b"):
        np.testing.assert_array_equal(jnp.ravel(multipliers["c"][leaf]), [dense])
    assert multipliers["norm"] == 1
    for multiplier, leaf in zip(
        jax.tree.leaves(multipliers), jax.tree.leaves(params), strict=True
    ):
        assert np.broadcast_shapes(multiplier.shape, leaf.shape) == leaf.shape
