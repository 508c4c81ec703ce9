"""The whole analysis: its table against NumPy, its invariances, layers and options.

Scales are for powers of two here, to the bit, and for any power of ten in
`test_properties`; faults for `test_faults`.
"""

import dataclasses
import functools
import math
import re
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
    SHAPES,
    alpha_tolerance,
    analysis_of,
    analyze,
    assert_same,
    check_multipliers,
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

EPS = eps_of(np.float32)
FLOOR = 5.0


@pytest.mark.parametrize("floor", [None, FLOOR])
def test_table_equals_numpy(floor):
    for seed in range(2):
        kernels = make_kernels(seed)
        analysis = analyze(kernels, eigenvalue_floor=floor)
        assert analysis.layers == EXPANDED
        alphas = check_table(analysis, kernels, reference.fit_median, floor=floor)
        check_multipliers(analysis, alphas)
        if floor is None:
            # Only of the size 1 the tail is a single value.
            assert (alphas > 0).sum() == len(alphas) - 1


def test_the_floor_lies_inside_some_spectra_and_above_others():
    """As `test_table_equals_numpy` needs it: what lies below all is kept."""
    kernels = make_kernels(0)
    kept = [
        (spectra.eigenvalues_of(kernels[layer.path], layer) > FLOOR).mean()
        for layer in EXPANDED
    ]
    assert min(kept) == 0
    assert any(0 < share < 1 for share in kept)


@pytest.mark.usefixtures("x64")
def test_table_equals_numpy_in_float64():
    """Kernels of float64 stay float64 under x64, on both routes."""
    kernels = make_kernels(0, np.float64)
    fits = (
        (fit_median(), reference.fit_median),
        (fit_peak(), reference.fit_peak),
    )
    for fit, exact in fits:
        analysis = analyze(kernels, fit=fit)
        for name, column in columns_of(analysis).items():
            if np.issubdtype(column.dtype, np.floating):
                assert column.dtype == np.float64, name
        alphas = check_table(analysis, kernels, exact, dtype=np.float64)
        check_multipliers(analysis, alphas)


# --- invariances --------------------------------------------------------------------


IN_NO_UNIT = (
    *("alpha", "ks_distance", "tail_size", "eigenvalue_count", "stable_rank"),
    *("multipliers", "fitted", "tuned"),
)


@pytest.mark.parametrize("power", [-120, -1, 60, 110])
def test_powers_of_two_change_nothing_to_the_bit(power):
    """The kernels hold integers, so that all of them are normal numbers.

    Only what is in units of eigenvalues may leave the range of its type.
    """
    rng = np.random.default_rng(6)
    kernels = {}
    for name, shape in SHAPES.items():
        heavy = rng.standard_cauchy(size=shape) * 4
        kernels[name] = float32(np.clip(np.round(heavy), -999, 999))
    scaled = {name: np.ldexp(kernel, power) for name, kernel in kernels.items()}
    for name in SHAPES:
        np.testing.assert_array_equal(np.ldexp(scaled[name], -power), kernels[name])
    estimated = tb_optax.quadrature(above=0)
    routes = ({}, {"spectrum": estimated}, {"fit": fit_min_ks()}, {"fit": fit_peak()})
    for options in routes:
        before, after = analyze(kernels, **options), analyze(scaled, **options)
        for name, column in columns_of(after).items():
            assert name == "xmin" or np.isfinite(column).all(), name
        if options == {"fit": fit_peak()}:
            continue  # As published, its window depends on the scale.
        assert_same(before, after, IN_NO_UNIT)
        normal = np.finfo(np.float32).tiny
        with np.errstate(over="ignore", under="ignore"):
            for name in ("spectral_norm", "frobenius_norm"):
                moved = np.ldexp(np.asarray(getattr(before, name)), power)
                found = np.asarray(getattr(after, name))
                held = moved >= normal
                np.testing.assert_array_equal(found[held], moved[held])
                assert (found[~held] < normal).all()
        hat = np.asarray(before.alpha_hat) + 2 * power * math.log10(2) * before.alpha
        np.testing.assert_allclose(after.alpha_hat, hat, rtol=84 * EPS, atol=1e-4)
        if abs(power) == 120:
            assert not np.asarray(after.xmin).any()


def test_transposed_layers():
    """Swapping inputs and outputs, in the axes or in the kernel, changes nothing."""
    kernels = make_kernels(11)
    layers, turned = [], {}
    for layer in LAYERS:
        kernel, axes = kernels[layer.path], layer.axes
        swapped = MatrixAxes(axes.output, axes.reduction, axes.pooled, axes.stacked)
        layers.append(dataclasses.replace(layer, axes=swapped))
        # The kernel with its axes in reverse, and the same axes by their new numbers.
        turned[f"{layer.path} turned"] = kernel.transpose()
        groups = (axes.reduction, axes.output, axes.pooled, axes.stacked)
        moved = [tuple(kernel.ndim - 1 - axis for axis in group) for group in groups]
        layers.append(Layer(f"{layer.path} turned", MatrixAxes(*moved)))
    after = layer_analysis(layers, min_eigenvalues=20)(kernels | turned)
    alphas = check_table(after, kernels | turned, reference.fit_median)
    check_multipliers(after, alphas)
    known = check_table(analyze(kernels), kernels, reference.fit_median)
    np.testing.assert_allclose(np.sort(alphas), np.repeat(np.sort(known), 2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_its_float32_cast(dtype):
    """Exactly: the cast comes first, subnormal numbers of the half type included."""
    kernels = {
        name: jnp.asarray(kernel, dtype) for name, kernel in make_kernels(12).items()
    }
    tiny = float(jnp.finfo(dtype).tiny)
    kernels["wide"] = (make_kernels(13)["wide"] * tiny).astype(dtype)
    cast = {name: np.asarray(kernel, np.float32) for name, kernel in kernels.items()}
    half, full = analyze(kernels), analyze(cast)
    for name, column in columns_of(half).items():
        assert column.dtype == columns_of(full)[name].dtype
    assert_same(half, full)
    # The subnormal numbers of bfloat16 are those of float32, and count as zero.
    not_fitted = ~np.asarray(half.fitted)
    assert not_fitted.sum() == 1 + (dtype == jnp.bfloat16)


@pytest.mark.usefixtures("x64")
def test_dtypes_mixed_in_one_tree():
    """Each kernel is decomposed in its own precision; the table holds the widest."""
    double = make_kernels(14, np.float64)
    dtypes = {"conv": jnp.bfloat16, "square": np.float32}
    mixed = {x: jnp.asarray(w, dtypes.get(x, np.float64)) for x, w in double.items()}
    analysis = analyze(mixed)
    assert analysis.alpha.dtype == np.float64
    plain = {name: np.asarray(kernel, np.float64) for name, kernel in mixed.items()}
    check_table(analysis, plain, reference.fit_median)
    exact = analyze(plain)
    for i, layer in enumerate(analysis.layers):
        eps = eps_of(np.float32 if layer.path in dtypes else np.float64)
        eigenvalues = spectra.eigenvalues_of(plain[layer.path], layer)
        tail = eigenvalues[len(eigenvalues) // 2 :]
        alpha = float(exact.alpha[i])
        side = min(layer.matrix_shape(SHAPES[layer.path]))
        tolerance = alpha_tolerance(alpha or 1, tail, side, eps)
        assert analysis.alpha[i] == pytest.approx(alpha, rel=tolerance)


# --- which layers, in which order ---------------------------------------------------


def test_order_of_layers_is_the_order_of_rows():
    kernels = make_kernels(15)
    before = columns_of(analyze(kernels))
    order = np.random.default_rng(0).permutation(len(EXPANDED))
    layers = [EXPANDED[i] for i in order]
    after = layer_analysis(layers, min_eigenvalues=20)(kernels)
    assert after.layers == tuple(layers)
    for name, column in columns_of(after).items():
        expected = before[name][order]
        np.testing.assert_allclose(column, expected, rtol=84 * EPS, err_msg=name)


def test_conv_norm_scales_what_is_pooled():
    kernels = make_kernels(18)
    analysis = analyze(kernels, conv_norm=2.0)
    alphas = check_table(analysis, kernels, reference.fit_median, conv_norm=2.0)
    check_multipliers(analysis, alphas)


def test_largest_side_is_bounded():
    """The smaller side counts, of a part its own; what is estimated is not bound."""
    kernels = make_kernels(19)
    with pytest.raises(ValueError, match="max_dim = 49") as error:
        analyze(kernels, max_dim=49)
    words = ("'dense'", "50 x 50", "leave it out", "raise max_dim", "part")
    for word in (*words, "spectrum=quadrature()"):
        assert word in str(error.value)
    halves = [Layer("square", DENSE, part=(1, i, i + 25)) for i in (0, 25)]
    both = [Layer(name, DENSE) for name in ("dense", "wide")]
    cases: list[tuple[Any, dict[str, Any]]] = [
        (halves, {"max_dim": 25}),
        (both, {"max_dim": 50}),
        (both, {"max_dim": 49, "spectrum": tb_optax.quadrature(above=49)}),
    ]
    for layers, options in cases:
        analyze_some = layer_analysis(layers, min_eigenvalues=0, **options)
        jax.eval_shape(analyze_some, kernels)
    with pytest.raises(ValueError, match=r"'conv' .*20 x 20.*max_dim = 19"):
        analyze(kernels, max_dim=19, spectrum=tb_optax.quadrature(above=20))


# --- who is tuned -------------------------------------------------------------------

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
    with pytest.warns(UserWarning, match="'dense' with 50 .* there is no other layer"):
        alone = layer_analysis([Layer("dense", DENSE)])(kernels)
    twins = {"a": kernels["dense"], "b": kernels["dense"]}
    for analysis in (alone, layer_analysis([Layer(x, DENSE) for x in twins])(twins)):
        assert analysis.tuned.all()
        assert (analysis.multipliers == 1).all()


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric with given numbers."""

    numbers: tuple[float, ...]

    def __call__(self, analysis):
        """Return the numbers, whatever the analysis."""
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
    expected = assign(scores, jnp.ones(5, bool))
    np.testing.assert_allclose(analysis.multipliers[inside], expected, rtol=6 * EPS)


def test_any_column_may_be_the_metric():
    for metric in tb_optax.analysis.METRICS:
        analysis = jax.eval_shape(analysis_of_six(metric=metric), make_six(9))
        assert analysis.multipliers == jax.ShapeDtypeStruct((6,), jnp.float32)
    analysis = analysis_of_six(metric="stable_rank")(make_six(9))
    assert analysis.tuned.all()
    column = np.asarray(analysis.stable_rank, np.float64)
    np.testing.assert_allclose(
        analysis.multipliers,
        0.5 + (column - column.min()) / np.ptp(column),
        atol=4 * EPS * (1 + np.abs(column).max() / np.ptp(column)),
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
    # The third λ is at least a hundredth of λ_max.
    tolerance = 100 * 8.4 * EPS * math.sqrt(50)
    for row, layer in zip(analysis.rows(), analysis.layers, strict=True):
        eigenvalues = spectra.eigenvalues_of(kernels[layer.path], layer)
        assert row["fitted"] == (len(eigenvalues) >= 3)
        if row["fitted"]:
            third, top = eigenvalues[-3], eigenvalues[-1]
            assert third > top / 100
            ratio = math.log(top / third)
            assert row["alpha"] == pytest.approx(1 + ratio, abs=tolerance)
            assert row["xmin"] == pytest.approx(third, rel=tolerance)


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
    bad, good = slice(0, 6, 2), slice(1, 6, 2)
    for name in ("alpha", "alpha_hat", "ks_distance", "xmin", "tail_size", "fitted"):
        assert not np.asarray(getattr(analysis, name))[bad].any()
    np.testing.assert_array_equal(analysis.multipliers[bad], 1)
    np.testing.assert_array_equal(analysis.alpha[good], float32(alphas[good]))
    assert analysis.tuned[good].all()
    expected = reference.multipliers(
        np.asarray(alphas[good]), "tb_linear_map", 0.5, 1.5
    )
    np.testing.assert_allclose(analysis.multipliers[good], expected, rtol=4 * EPS)


@pytest.mark.parametrize("field", PowerLaw._fields)
def test_fit_of_the_wrong_shape(field):
    def fit(log_eigenvalues, valid):
        law = fit_median()(log_eigenvalues, valid)
        return law._replace(**{field: getattr(law, field)[:-1]})

    with pytest.raises(ValueError, match=rf"fit \({field}\).*\(6,\).*\(5,\)"):
        jax.eval_shape(analysis_of_six(fit=fit), make_six(0))


@pytest.mark.parametrize("name", ["metric", "assign"])
@pytest.mark.parametrize("shape", [(), (6, 1), (3,)], ids=str)
def test_functions_of_the_wrong_shape(name, shape):
    analysis = analysis_of_six(**{name: lambda *_: jnp.ones(shape)})
    message = rf"{name} must return shape \(6,\).*{re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(analysis, make_six(0))


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


@pytest.mark.parametrize("metric", ["aplha", "multipliers"])
def test_a_metric_is_a_column(metric):
    with pytest.raises(ValueError, match=f"metric must be .*alpha_hat.*'{metric}'"):
        layer_analysis(LAYERS, metric=metric)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((4, 4), "int32", "int32"),
        ((0, 4), "float32", r"\(0, 4\)"),
        ((4, 4), "complex64", "complex64"),
    ],
)
def test_kernels_without_a_spectrum(shape, dtype, message):
    kernels = {"w": jnp.ones(shape, dtype)}
    with pytest.raises(ValueError, match="a kernel must be floating and not") as error:
        layer_analysis([Layer("w", DENSE)])(kernels)
    assert re.search(f"'w'.*{message}", str(error.value))


# --- under transformations, and what the table is for -------------------------------


def test_under_jit_vmap_and_without_work():
    trees = [make_six(seed) for seed in (14, 15, 16)]
    trees[1]["fifty"][1] = math.nan
    inside = jax.jit(lambda params: analysis_of_six()(params))(trees[0])
    batch = jax.tree.map(lambda *kernels: jnp.stack(kernels), *trees)
    analyses = jax.vmap(analysis_of_six())(batch)
    for i, tree in enumerate(trees):
        analysis = jax.tree.map(lambda column, i=i: column[i], analyses)
        alone = analysis_of_six()(tree)
        assert inside.layers == analysis.layers == alone.layers
        if i == 0:
            assert_same(inside, alone)
        for name, column in columns_of(alone).items():
            found = columns_of(analysis)[name]
            np.testing.assert_allclose(found, column, rtol=84 * EPS)
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_kernels(17)))
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


def test_rows_are_plain():
    rows = analyze(make_kernels(21)).rows()
    assert [row["layer"] for row in rows] == [layer.name for layer in EXPANDED]
    types = {type(value) for row in rows for value in row.values()}
    assert types == {str, float, int, bool}


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
    np.testing.assert_array_equal(multipliers["a"]["w"], stacked[:, None, None])
    np.testing.assert_array_equal(multipliers["a"]["b"], stacked[:, None])
    for leaf in ("w", "b"):
        np.testing.assert_array_equal(jnp.ravel(multipliers["c"][leaf]), [dense])
    assert multipliers["norm"] == 1
    jax.tree.map(
        lambda own, leaf: np.broadcast_to(own, leaf.shape), multipliers, params
    )
