"""The whole analysis: its table against NumPy, its invariances, its layers."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
import reference
import spectra
from layer_table import (
    CONV,
    DENSE,
    EXPANDED,
    LAYERS,
    SHAPES,
    ZOO,
    alpha_tolerance,
    analyze,
    assert_same,
    check_multipliers,
    check_table,
    columns_of,
    make_kernels,
    where_a_tail_exists,
)
from spectra import eps_of, float32

import tb_optax
from tb_optax import Layer, MatrixAxes, fit_median, fit_min_ks, fit_peak

FITS = {
    "median": (fit_median(), reference.fit_median, {}),
    "floor": (fit_median(), reference.fit_median, {"eigenvalue_floor": 0.05}),
}


@pytest.mark.parametrize("name", FITS)
def test_table_equals_numpy(name):
    fit, exact, options = FITS[name]
    for seed in range(2):
        kernels = make_kernels(seed)
        analysis = analyze(kernels, fit=fit, **options)
        assert analysis.layers == EXPANDED
        floor = options.get("eigenvalue_floor")
        alphas = check_table(analysis, kernels, exact, floor=floor)
        check_multipliers(analysis, alphas)
        # Only of the size 1 the tail is a single value.
        assert (alphas > 0).sum() == len(alphas) - 1


@pytest.mark.usefixtures("x64")
def test_table_equals_numpy_in_float64():
    """Kernels of float64 stay float64 under x64, on both routes."""
    kernels = make_kernels(0, np.float64)
    fits = (
        (fit_median(), reference.fit_median),
        (fit_peak(), where_a_tail_exists(reference.fit_peak)),
    )
    for fit, exact in fits:
        analysis = analyze(kernels, fit=fit)
        for name, column in columns_of(analysis).items():
            if np.issubdtype(column.dtype, np.floating):
                assert column.dtype == np.float64, name
        alphas = check_table(analysis, kernels, exact, dtype=np.float64)
        check_multipliers(analysis, alphas)


@pytest.mark.parametrize("published", [None, True, False])
def test_fits_of_the_whole_spectrum_in_float32(published):
    """One of the best tails of its window: rounding may choose among near ties.

    A distance is off by at most 2e-5, the error of ln λ by singular values times
    the slope of the fit; the alpha of that tail by 1e-4 of itself.
    """
    fit = fit_min_ks() if published is None else fit_peak(published_window=published)
    kernels = make_kernels(4)
    analysis = analyze(kernels, fit=fit)
    for row, layer in zip(analysis.rows(), analysis.layers, strict=True):
        eigenvalues = spectra.eigenvalues_of(kernels[layer.path], layer)
        if len(eigenvalues) < 3:
            continue
        window = None
        if published is not None:
            window = reference.peak_window(eigenvalues, published=published)
        tried = reference.candidates(eigenvalues, window)
        first = len(eigenvalues) - row["tail_size"]
        assert tried.ks_distance[first] <= tried.ks_distance.min() + 2e-5
        assert row["ks_distance"] == pytest.approx(tried.ks_distance[first], abs=2e-5)
        assert row["alpha"] == pytest.approx(tried.alpha[first], rel=1e-4)
        assert row["xmin"] == pytest.approx(eigenvalues[first], rel=2e-5)


def test_prescribed_spectra_need_no_decomposition():
    """The singular values that a kernel was made with give its alpha."""
    rng = np.random.default_rng(0)
    sigma = {
        "square": spectra.pareto_quantiles(2.2, 50) ** 0.5,
        "dense": spectra.clusters(50),
        "wide": spectra.gap(50),
        "three": np.asarray([1.0, 2.0, 5.0]),
    }
    kernels = make_kernels(5)
    for name, values in sigma.items():
        made = spectra.with_singular_values(rng, values, *SHAPES[name])
        kernels[name] = float32(made)
    analysis = analyze(kernels)
    for row in analysis.rows():
        if row["layer"] not in sigma:
            continue
        eigenvalues = sigma[row["layer"]] ** 2
        size = len(eigenvalues) - len(eigenvalues) // 2
        exact = spectra.hill(eigenvalues, size)
        tail, side = eigenvalues[-size:], len(eigenvalues)
        # Rounding the kernel to float32 is a perturbation like that of the Gram.
        tolerance = 2 * alpha_tolerance(exact, tail, side, eps_of(np.float32))
        assert row["alpha"] == pytest.approx(exact, rel=tolerance)
        assert row["spectral_norm"] == pytest.approx(
            eigenvalues[-1] ** 0.5, rel=84 * eps_of(np.float32)
        )


# --- invariances --------------------------------------------------------------------


def assert_close_fits(one, other, kernels, factor=2.0):
    """Alphas equal within the error of two computations, and the map of them."""
    eps = eps_of(np.float32)
    one, other = columns_of(one), columns_of(other)
    for name in ("fitted", "tuned", "tail_size", "eigenvalue_count"):
        np.testing.assert_array_equal(one[name], other[name])
    relative = np.zeros(len(EXPANDED))
    for i, layer in enumerate(EXPANDED):
        if one["fitted"][i]:
            side = min(layer.matrix_shape(SHAPES[layer.path]))
            eigenvalues = spectra.eigenvalues_of(kernels[layer.path], layer)
            tail = eigenvalues[-one["tail_size"][i] :]
            relative[i] = alpha_tolerance(one["alpha"][i], tail, side, eps)
    error = factor * relative * one["alpha"]
    np.testing.assert_array_less(np.abs(one["alpha"] - other["alpha"]), error + 1e-30)
    spread = np.ptp(one["alpha"][one["tuned"]])
    np.testing.assert_allclose(
        one["multipliers"], other["multipliers"], atol=4 * error.max() / spread
    )


@pytest.mark.parametrize("power", [-120, -100, -1, 1, 60, 110])
def test_powers_of_two_change_nothing_to_the_bit(power):
    """The kernels hold integers, so that all of them are normal numbers."""
    rng = np.random.default_rng(6)
    kernels = {}
    for name, shape in SHAPES.items():
        heavy = rng.standard_cauchy(size=shape) * 4
        kernels[name] = float32(np.clip(np.round(heavy), -999, 999))
    before = analyze(kernels)
    scaled = {name: np.ldexp(kernel, power) for name, kernel in kernels.items()}
    for name in SHAPES:
        np.testing.assert_array_equal(np.ldexp(scaled[name], -power), kernels[name])
    after = analyze(scaled)
    unchanged = (
        "alpha",
        "ks_distance",
        "tail_size",
        "eigenvalue_count",
        "stable_rank",
        "multipliers",
        "fitted",
        "tuned",
    )
    assert_same(before, after, unchanged)
    normal = np.finfo(np.float32).tiny
    with np.errstate(over="ignore", under="ignore"):
        for name in ("spectral_norm", "frobenius_norm"):
            moved = np.ldexp(np.asarray(getattr(before, name)), power)
            found = np.asarray(getattr(after, name))
            held = moved >= normal
            np.testing.assert_array_equal(found[held], moved[held])
            assert (found[~held] < normal).all()
    hat = np.asarray(before.alpha_hat) + 2 * power * math.log10(2) * before.alpha
    np.testing.assert_allclose(
        after.alpha_hat, hat, rtol=84 * eps_of(np.float32), atol=1e-4
    )
    for name in columns_of(after):
        if name != "xmin":
            assert np.isfinite(getattr(after, name)).all(), name


def test_numbers_below_the_smallest_normal_one_count_as_zero():
    """A listed deviation: such a kernel is not fitted, and disturbs no other."""
    kernels = make_kernels(7)
    tiny = float32(kernels["wide"] * 1e-40)
    before, after = analyze(kernels), analyze({**kernels, "wide": tiny})
    own = [layer.path == "wide" for layer in before.layers]
    assert any(own)
    others = ~np.asarray(own)
    assert np.asarray(before.fitted)[own].all()
    np.testing.assert_array_equal(after.fitted, before.fitted & others)
    np.testing.assert_array_equal(np.asarray(after.multipliers)[own], 1)
    np.testing.assert_array_equal(after.alpha[others], before.alpha[others])


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1e6, 1e30])
def test_scale_invariance(scale):
    """Rounding each scaled entry is one perturbation more."""
    kernels = make_kernels(7)
    scaled = {name: float32(kernel * scale) for name, kernel in kernels.items()}
    before, after = analyze(kernels), analyze(scaled)
    assert_close_fits(before, after, kernels, factor=4)
    for name in ("spectral_norm", "frobenius_norm"):
        np.testing.assert_allclose(
            np.float64(getattr(after, name)),
            scale * np.float64(getattr(before, name)),
            rtol=84 * eps_of(np.float32),
        )
    # What the scaled kernels are in float64, undone, has the same alpha.
    undone = {
        name: float32(np.float64(kernel) / scale) for name, kernel in scaled.items()
    }
    assert_close_fits(analyze(undone), after, undone, factor=4)


def rotate(kernels, left):
    """Multiplies the matrices of the zoo by an orthogonal one, from one side."""
    rng = np.random.default_rng(8)
    moved = {}
    for name, kernel in kernels.items():
        axes = ZOO[name][1]
        axis = (axes.reduction if left else axes.output)[-1]
        size = kernel.shape[axis]
        turn = spectra.orthonormal(rng, size, size)
        turned = np.tensordot(kernel.astype(np.float64), turn, axes=([axis], [0]))
        moved[name] = float32(np.moveaxis(turned, -1, axis))
    return moved


def permute(kernels, left):
    rng = np.random.default_rng(9)
    moved = {}
    for name, kernel in kernels.items():
        axes = ZOO[name][1]
        axis = (axes.reduction if left else axes.output)[-1]
        order = rng.permutation(kernel.shape[axis])
        moved[name] = np.take(kernel, order, axis)
    return moved


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("move", [rotate, permute])
def test_orthogonal_invariance(move, left):
    """Orthogonal matrices act on the inner axis of "heads" only: its λ stay too."""
    kernels = make_kernels(10)
    assert_close_fits(analyze(kernels), analyze(move(kernels, left)), kernels, factor=4)


def test_transposed_layers():
    """Swapping inputs and outputs, in the axes or in the kernel, changes nothing."""
    kernels = make_kernels(11)
    before = analyze(kernels)
    layers, turned = [], {}
    for layer in LAYERS:
        axes = layer.axes
        swapped = dataclasses.replace(
            axes, reduction=axes.output, output=axes.reduction
        )
        layers.append(dataclasses.replace(layer, axes=swapped))
    for layer in LAYERS:
        # The kernel with its axes in reverse, and the same axes by their new numbers.
        kernel, axes = kernels[layer.path], layer.axes
        turned[f"{layer.path} turned"] = kernel.transpose()
        groups = (axes.reduction, axes.output, axes.pooled, axes.stacked)
        moved = [tuple(kernel.ndim - 1 - axis for axis in group) for group in groups]
        layers.append(Layer(f"{layer.path} turned", MatrixAxes(*moved)))
    after = tb_optax.layer_analysis(layers, min_eigenvalues=20)(kernels | turned)
    rows = len(EXPANDED)
    for half in (slice(0, rows), slice(rows, 2 * rows)):
        part = {name: column[half] for name, column in columns_of(after).items()}
        assert_close_fits(before, dataclasses.replace(before, **part), kernels)


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
    mixed = dict(double)
    for name, dtype in (("conv", jnp.bfloat16), ("square", np.float32)):
        mixed[name] = jnp.asarray(double[name], dtype)
    mixed = {name: jnp.asarray(kernel) for name, kernel in mixed.items()}
    analysis = analyze(mixed)
    assert analysis.alpha.dtype == np.float64
    plain = {name: np.asarray(kernel, np.float64) for name, kernel in mixed.items()}
    check_table(analysis, plain, reference.fit_median)
    exact = analyze(plain)
    for i, layer in enumerate(analysis.layers):
        eps = eps_of(np.float32 if layer.path in ("conv", "square") else np.float64)
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
    after = tb_optax.layer_analysis(layers, min_eigenvalues=20)(kernels)
    assert after.layers == tuple(layers)
    for name, column in columns_of(after).items():
        np.testing.assert_allclose(
            column, before[name][order], rtol=84 * eps_of(np.float32), err_msg=name
        )
        if name in ("tail_size", "eigenvalue_count", "fitted", "tuned"):
            np.testing.assert_array_equal(column, before[name][order])


def test_slices_of_stacks_equal_separate_kernels():
    """Any slices in any order, along any axes; parts too."""
    rng = np.random.default_rng(16)
    kernel = float32(rng.standard_t(3, size=(3, 40, 2, 66)))
    axes = MatrixAxes((1,), (3,), stacked=(2, 0))
    wanted = [(1, 2), (0, 0), (1, 0), (0, 2)]
    layers = [Layer("stack", axes, index=index) for index in wanted]
    layers += [
        Layer("stack", axes, index=(0, 1), part=(3, start, start + 22))
        for start in (44, 0, 22)
    ]
    params = {"stack": kernel}
    stacked = tb_optax.layer_analysis(layers, min_eigenvalues=22)(params)
    alone = {}
    for i, layer in enumerate(layers):
        own = kernel[layer.index[1], :, layer.index[0]]
        if layer.part:
            own = own[:, layer.part[1] : layer.part[2]]
        alone[f"{i}"] = own
    separate = tb_optax.layer_analysis(
        [Layer(name, DENSE) for name in alone], min_eigenvalues=22
    )(alone)
    assert_same(stacked, separate, ("tail_size", "eigenvalue_count", "fitted", "tuned"))
    for name, column in columns_of(stacked).items():
        np.testing.assert_allclose(
            column,
            columns_of(separate)[name],
            rtol=84 * eps_of(np.float32),
            atol=1e-5,
            err_msg=name,
        )
    assert len(set(np.asarray(stacked.alpha).tolist())) == len(layers)


def test_parts_of_a_fused_kernel_are_layers():
    """Three thirds of a (60, 3 x 50) kernel, with their thirds of the bias."""
    rng = np.random.default_rng(17)
    fused = float32(rng.standard_t(3, size=(60, 3 * 50)))
    params = {"qkv": jnp.asarray(fused), "b": jnp.zeros(150)}
    layers = [
        Layer("qkv", DENSE, ("b",), part=(1, start, start + 50))
        for start in (0, 50, 100)
    ]
    analysis = tb_optax.layer_analysis(layers)(params)
    for i, layer in enumerate(layers):
        eigenvalues = spectra.eigenvalues_of(fused, layer)
        law = reference.fit_median(eigenvalues)
        tail = eigenvalues[-law.tail_size :]
        tolerance = alpha_tolerance(law.alpha, tail, 50, eps_of(np.float32))
        assert analysis.alpha[i] == pytest.approx(law.alpha, rel=tolerance)
    multipliers = analysis.leaf_multipliers(params)
    third = np.repeat(np.asarray(analysis.multipliers), 50)
    np.testing.assert_array_equal(multipliers["b"], third)
    np.testing.assert_array_equal(multipliers["qkv"], third[None])
    assert set(np.round(third, 6)) > {0.5, 1.5}


def test_conv_norm_scales_what_is_pooled():
    kernels = make_kernels(18)
    half, double = analyze(kernels), analyze(kernels, conv_norm=2.0)
    pooled = np.asarray([bool(layer.axes.pooled) for layer in EXPANDED])
    assert_same(half, double, rows=~pooled)
    unit = {"spectral_norm": 2, "frobenius_norm": 2, "xmin": 4}
    for name, column in columns_of(double).items():
        if name == "alpha_hat":
            expected = half.alpha_hat + half.alpha * math.log10(4)
        else:
            expected = columns_of(half)[name] * unit.get(name, 1)
        np.testing.assert_allclose(column[pooled], expected[pooled], rtol=1e-6)


def test_largest_side_is_bounded():
    kernels = make_kernels(19)
    with pytest.raises(ValueError, match="max_dim = 49") as error:
        analyze(kernels, max_dim=49)
    for word in ("'dense'", "50 x 50", "leave it out", "raise max_dim", "part"):
        assert word in str(error.value)
    # The smaller side counts, and of a part its own.
    halves = [Layer("square", DENSE, part=(1, i, i + 25)) for i in (0, 25)]
    tb_optax.layer_analysis(halves, min_eigenvalues=0, max_dim=25)(kernels)
    both = [Layer(name, DENSE) for name in ("dense", "wide")]
    tb_optax.layer_analysis(both, max_dim=50)(kernels)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 10.0])
def test_floor_keeps_what_is_above_it(scale):
    """λ = 1e-6 (ten), 1e-4 (ten), then 30 of a power law, times scale².

    The floor 1e-5 cuts twenty at scale 0.1, ten at 1 and none at 10; at 1e-3 all 50
    lie below it, as those of another layer always do, and then all are kept.
    """
    tail = spectra.pareto_quantiles(2.0, 30, xmin=1e-2)
    eigenvalues = np.concatenate([[1e-6] * 10, [1e-4] * 10, tail])
    rng = np.random.default_rng(20)
    made = spectra.with_singular_values(rng, scale * eigenvalues**0.5, 60, 50)
    below = spectra.with_singular_values(rng, 1e-3 * np.linspace(1, 2, 50), 60, 50)
    conv = np.stack([made, made])[None] * math.sqrt(2)
    params = {
        name: jnp.asarray(kernel, jnp.float32)
        for name, kernel in {"made": made, "below": below, "conv": conv}.items()
    }
    layers = [Layer("made", DENSE), Layer("below", DENSE), Layer("conv", CONV)]
    analysis = tb_optax.layer_analysis(layers, eigenvalue_floor=1e-5)(params)
    kept = eigenvalues[eigenvalues * scale**2 > 1e-5]
    kept = kept if len(kept) else eigenvalues
    size = len(kept) - len(kept) // 2
    np.testing.assert_array_equal(analysis.tail_size, [size, 25, 2 * size])
    np.testing.assert_array_equal(analysis.eigenvalue_count, [50, 50, 100])
    # Of twice each λ the excesses are the same, each twice; so is the Hill estimate,
    # but where the tail begins at one of a pair.
    pairs = np.repeat(kept, 2)
    expected = [
        spectra.hill(kept, size),
        spectra.hill(np.linspace(1, 2, 50) ** 2, 25),
        spectra.hill(pairs, len(pairs) - len(pairs) // 2),
    ]
    np.testing.assert_allclose(analysis.alpha, expected, rtol=1e-4)
    total = scale * math.sqrt(eigenvalues.sum())
    np.testing.assert_allclose(
        analysis.frobenius_norm[0], total, rtol=84 * eps_of(np.float32)
    )
    np.testing.assert_allclose(
        analysis.stable_rank[0],
        eigenvalues.sum() / eigenvalues[-1],
        rtol=84 * eps_of(np.float32),
    )
