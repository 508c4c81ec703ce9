"""Windows of one aspect ratio: parity with the published code, and own promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from family import has_floor, recorded
from golden import CONV, LINEAR

import tb_optax
from tb_optax import Layer, MatrixAxes, windows
from tb_optax.spectrum import as_matrices
from tb_optax.submatrices import cut_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Published code reads a convolution by its positions where these outnumber channels.
SWAPPED = MatrixAxes((3,), (2,), pooled=(0, 1))


def axes_of(shape):
    if len(shape) == 2:
        return LINEAR
    return CONV if shape[0] + shape[1] >= shape[2] + shape[3] else SWAPPED


def windows_of(config, published):
    count = config["sampling_ops_per_dim"]
    step = None if count else config["step_size"]
    published = published and count != 1  # There it raises.
    return windows(config["Q_ratio"], config["num_row_samples"], count, step, published)


def spectra_of(kernel, axes, cut, conv_norm):
    """The eigenvalues of each block, by NumPy."""
    read = jax.jit(lambda w: cut.cut(as_matrices(w, axes), bool(axes.pooled)))
    blocks = np.asarray(read(kernel), np.float64)
    singular = np.linalg.svd(blocks, compute_uv=False)
    factor = conv_norm if axes.pooled else 1.0
    return np.sort((factor * singular**2).reshape(len(blocks), -1), axis=-1)


FITS = {
    "median": reference.fit_median,
    "goodness-of-fit": lambda row, _: reference.fit_min_ks(row),
    "xmin_peak": lambda row, _: reference.fit_peak(row),
    # There an unknown name is the goodness of fit.
    "fix-finger": lambda row, _: reference.fit_min_ks(row),
}


def fitted(rows, config):
    """Alpha and D, the means over the blocks, by the reference in NumPy."""
    floor = 1e-5 if has_floor(config) else None
    laws = [
        FITS[config["pl_fitting"]](
            reference.above_floor(row, floor), config["xmin_pos"]
        )
        for row in rows
    ]
    return np.mean([(law.alpha, law.ks_distance) for law in laws], axis=0)


@pytest.mark.parametrize(
    ("name", "key", "rows"),
    [
        ("farms_windows_linear", "metrics", 100),
        ("farms_windows_linear", "intended", 40),
        ("farms_windows_conv", "metrics", 90),
    ],
)
def test_windows_are_those_of_the_published_code(name, key, rows, x64):
    """Every geometry; the fits are shared with the other tests of parity."""
    del x64
    info, arrays = recorded(name)
    columns = info["metric_columns"]
    least, compared = rows, 0
    for row, over in enumerate(info["configs"]):
        config = info["config_defaults"] | over
        if not config["use_sliding_window"] or config["num_row_samples"] == 40:
            continue  # 40 with 200 windows a side takes long.
        cut = windows_of(config, published=key == "metrics")
        for place, layer in enumerate(info["layer_names"]):
            expected = arrays[f"{key}_f64"][row, place]
            differs = info["geometry"][row][layer].get("differs", True)
            if not np.isfinite(expected[0]) or (key == "intended" and not differs):
                continue
            kernel = arrays[f"param/{layer}.weight"].astype(np.float64)
            axes = axes_of(kernel.shape)
            rows = spectra_of(kernel, axes, cut, config["conv_norm"])
            alpha, distance = fitted(rows, config)
            found = {"alpha": alpha, "D": distance}
            found["spectral_norm"] = rows[:, -1].mean()
            found["norm"] = rows.sum(axis=1).mean()
            if not has_floor(config):  # It counts what the floor has left.
                found["eigs_num"] = rows.size
                geometry = cut_of(Layer("", axes), kernel.shape, cut)
                assert geometry.eigenvalue_count == rows.size
            for column, value in found.items():
                own = expected[columns.index(column)]
                assert abs(value - own) <= 1e-9 * max(1, abs(own)), (row, layer, column)
            compared += 1
    assert compared > least


@pytest.mark.parametrize("name", ["farms_linear", "farms_smallconv"])
def test_older_records_agree_in_float32(name):
    info, arrays = recorded(name)
    columns, config = info["metric_columns"], None
    for row, config in enumerate(info["metric_configs"]):
        failed = info["metric_status_f32"][row] != "ok"
        if failed or not config["use_sliding_window"] or row % 3:
            continue
        cut = windows_of(config, published=True)
        for place, layer in enumerate(info["layer_names"]):
            expected = arrays["metrics_f32"][row, place]
            if not np.isfinite(expected[0]):
                continue
            kernel = arrays[f"param/{layer}.weight"].astype(np.float64)
            axes = axes_of(kernel.shape)
            rows = spectra_of(kernel, axes, cut, config["conv_norm"])
            alpha, _ = fitted(rows.astype(np.float32), config)
            own = expected[columns.index("norm")]
            assert abs(rows.sum(axis=1).mean() - own) <= 1e-4 * max(1, own)
            if config["pl_fitting"] == "median":
                assert abs(alpha - expected[0]) <= 1e-4 * expected[0], (row, layer)


def gaussian(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


KERNELS = {
    "conv": gaussian((3, 3, 24, 60)),
    "tall": gaussian((130, 40), 1),
    "wide": gaussian((40, 130), 2),
}
LAYERS = (
    Layer("conv", MatrixAxes((2,), (3,), pooled=(0, 1))),
    Layer("tall", MatrixAxes((0,), (1,))),
    Layer("wide", MatrixAxes((0,), (1,))),
)
CUT = windows(1.0, 40, 3)


def test_a_windowed_analysis_is_one_of_its_windows():
    """Every column, from spectra by NumPy; the table says what was cut."""
    analyze = tb_optax.layer_analysis(LAYERS, windows=CUT, min_eigenvalues=1)
    table = analyze(KERNELS)
    for i, layer in enumerate(LAYERS):
        rows = spectra_of(KERNELS[layer.path], layer.axes, CUT, 0.5)
        config = {"pl_fitting": "median", "xmin_pos": 2}
        alpha, distance = fitted(rows, config)
        np.testing.assert_allclose(table.alpha[i], alpha, rtol=1e-4)
        np.testing.assert_allclose(table.ks_distance[i], distance, atol=1e-3)
        top = np.sqrt(rows[:, -1].mean())
        np.testing.assert_allclose(table.spectral_norm[i], top, rtol=1e-5)
        norm = np.sqrt(rows.sum(axis=1).mean())
        np.testing.assert_allclose(table.frobenius_norm[i], norm, rtol=1e-5)
        rank = (rows.sum(axis=1) / rows[:, -1]).mean()
        np.testing.assert_allclose(table.stable_rank[i], rank, rtol=1e-5)
        assert table.eigenvalue_count[i] == rows.size
    # All are square, and random: alpha does not depend on the shape of the kernel.
    np.testing.assert_allclose(table.random_alpha, 2.15, atol=0.06)
    np.testing.assert_allclose(table.alpha, table.random_alpha, rtol=0.1)


def test_a_spread_refresh_reads_the_same_windows():
    analyze = tb_optax.layer_analysis(LAYERS, windows=CUT, min_eigenvalues=1)
    tx = tb_optax.scale_by_temp_balance(analyze, interval=3, spread=True)
    state: Any = tx.init(KERNELS)
    update = jax.jit(tx.update)
    for params in [KERNELS] + [jax.tree.map(jnp.sin, KERNELS)] * 3:
        _, state = update(params, state, params)
    expected = analyze(jax.tree.map(jnp.sin, KERNELS))
    np.testing.assert_allclose(state.alpha, expected.alpha, rtol=1e-5)
    np.testing.assert_allclose(state.multipliers, expected.multipliers, atol=1e-4)


def test_what_no_window_reads_still_makes_a_kernel_unfit():
    """The last 12 rows of a convolution of 24 x 60 are in no block."""
    broken = KERNELS | {"conv": KERNELS["conv"].at[0, 0, 0, -1].set(jnp.nan)}
    analyze = tb_optax.layer_analysis(LAYERS, windows=CUT, min_eigenvalues=1)
    table = analyze(broken)
    assert table.fitted.tolist() == [False, True, True]
    assert table.alpha[0] == 0
    dead = KERNELS | {"conv": KERNELS["conv"].at[..., :24].set(0)}
    table = analyze(dead)  # One of two blocks is zero: the other one tells.
    assert table.fitted.all()


@pytest.mark.parametrize("shape", [(1, 3), (5, 5), (100, 7), (64, 300)])
def test_windows_fit_into_any_kernel(shape):
    for cut in (windows(), windows(2.0, 30, None, 7), windows(0.5, 30, 1)):
        geometry = cut.cut_of(shape[0], shape[1], None)
        stack = cut.cut(jnp.ones((2, 1, *shape)), pooled=False)
        assert stack.shape == (2, geometry.matrices, *geometry.shape)
        assert (np.asarray(geometry.shape) <= shape).all()
        geometry = cut.cut_of(shape[0], shape[1], 4)
        stack = cut.cut(jnp.ones((2, 4, *shape)), pooled=True)
        assert stack.shape == (2 * geometry.blocks, 4, *geometry.shape)


BAD = [
    (lambda: windows(ratio=0), "ratio must be a finite number > 0"),
    (lambda: windows(rows=0), "rows must be an int >= 1"),
    (lambda: windows(count=None), "need count or step"),
    (lambda: windows(count=3, step=2), "need count or step"),
    (lambda: windows(count=1, published=True), "count must be an int >= 2"),
    (
        lambda: tb_optax.layer_analysis(windows=windows(), spectrum=QUADRATURE),
        r"pass spectrum=exact\(\)",
    ),
]
QUADRATURE = tb_optax.quadrature()


@pytest.mark.parametrize(("make", "message"), BAD)
def test_what_makes_no_windows_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()
