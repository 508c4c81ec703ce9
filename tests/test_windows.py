"""Windows of one aspect ratio: parity with the published code, and own promises."""

import functools
from typing import Any

import family
import golden_library
import golden_record
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from family import has_floor, recorded
from golden import CONV, DTYPES, LINEAR, PRECISIONS

import tb_optax
from tb_optax import Layer, MatrixAxes, windows
from tb_optax.analysis import COLUMNS
from tb_optax.spectrum import as_matrices
from tb_optax.submatrices import cut_of

RECORD = golden_record.Record("windows")
check = RECORD.hold
FARMS = ("farms_linear", "farms_smallconv", "farms_resnet18_w0.125")

# Published code reads a convolution by its positions where these outnumber channels.
SWAPPED = MatrixAxes((3,), (2,), pooled=(0, 1))


def axes_of(shape, windowed=True):
    if len(shape) == 2:
        return LINEAR
    swapped = windowed and shape[0] + shape[1] < shape[2] + shape[3]
    return SWAPPED if swapped else CONV


def windows_of(config, kind="metrics", shape=()):
    """What a configuration cuts; None takes kernels whole."""
    if not config["use_sliding_window"]:
        return None
    count, rows = config["sampling_ops_per_dim"], config["num_row_samples"]
    if kind == "llm_copy":
        rows = min(rows, *shape)
    step = None if count else config["step_size"]
    published = kind != "intended" and count != 1  # There it raises.
    return windows(config["Q_ratio"], rows, count, step, published)


@functools.cache
def entries_of(kernels, cut):
    """Positions in kernels, given as (shape, axes), of the entries of their blocks."""

    @jax.jit
    def read(numbers):
        found = []
        for kernel, (_, axes) in zip(numbers, kernels, strict=True):
            stack = as_matrices(kernel, axes)
            found.append(stack if cut is None else cut.cut(stack, bool(axes.pooled)))
        return found

    numbers = [np.arange(np.prod(s), dtype=np.float32).reshape(s) for s, _ in kernels]
    return [np.asarray(entries).astype(int) for entries in read(numbers)]


def spectra(kernel, entries):
    """The eigenvalues of each block, by NumPy, at `conv_norm` 1."""
    blocks = np.asarray(kernel).ravel()[entries]
    singular = np.linalg.svd(blocks, compute_uv=False)
    return np.sort((singular**2).reshape(len(blocks), -1), axis=-1)


@functools.cache
def spectra_of(name, layer, cut):
    """The same of a recorded layer, in float64."""
    info, arrays = recorded(name)
    names = info["layer_names"]
    shapes = [arrays[f"param/{each}.weight"].shape for each in names]
    entries = entries_of(tuple((s, axes_of(s, cut is not None)) for s in shapes), cut)
    kernel = arrays[f"param/{layer}.weight"].astype(np.float64)
    return spectra(kernel, entries[names.index(layer)])


FITS = {
    **reference.FITS,
    "xmin_peak": reference.FITS["fix-finger"],
    # There an unknown name is the goodness of fit.
    "fix-finger": reference.FITS["goodness-of-fit"],
}


def by_numpy(rows, config):
    """The columns of one layer, means over its blocks, by the reference in NumPy."""
    floor = 1e-5 if has_floor(config) else None
    kept = [reference.above_floor(row.astype(np.float64), floor) for row in rows]
    laws = [FITS[config["pl_fitting"]](row, config["xmin_pos"]) for row in kept]
    top = np.asarray([row[-1] for row in kept])
    alphas = np.asarray([law.alpha for law in laws])
    return {
        "alpha": alphas.mean(),
        "alpha_hat": np.mean(alphas * np.log10(top)),
        "D": np.mean([law.ks_distance for law in laws]),
        "spectral_norm": top.mean(),
        "norm": rows.sum(axis=1).mean(),
        "stable_rank": (rows.sum(axis=1) / rows[:, -1]).mean(),
        "norm_stable_rank": rows.mean(),
        "eigs_num": sum(row.size for row in kept),
    }


def columns_of(name, layer, config, kind="metrics"):
    """The columns of a recorded layer under a configuration."""
    shape = recorded(name)[1][f"param/{layer}.weight"].shape
    rows = spectra_of(name, layer, windows_of(config, kind, shape))
    return by_numpy(rows * (config["conv_norm"] if len(shape) == 4 else 1), config)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "kind", "least"),
    [
        ("farms_windows_linear", "metrics", 100),
        ("farms_windows_linear", "intended", 40),
        ("farms_windows_linear", "llm_copy", 60),
        ("farms_windows_conv", "metrics", 90),
    ],
)
def test_windows_are_those_of_the_published_code(name, kind, least, precision):
    """Every geometry; the fits are shared with the other tests of parity."""
    info, arrays = recorded(name)
    published = arrays[f"{kind}_{family.SUFFIX[precision]}"]
    compared = 0
    for row, over in enumerate(info["configs"]):
        config = info["config_defaults"] | over
        for layer, expected in zip(info["layer_names"], published[row], strict=True):
            differs = info["geometry"][row][layer].get("differs", True)
            if not np.isfinite(expected[0]) or (kind == "intended" and not differs):
                continue
            found = columns_of(name, layer, config, kind)
            for column, own in zip(info["metric_columns"], expected, strict=True):
                where = f"{name}, {kind}, {row}, {layer}, {column}"
                check("windows", precision, found[column], own, where)
            compared += 1
    assert compared > least


def test_the_geometry_tells_how_many_eigenvalues_there_are():
    for name in ("farms_windows_linear", "farms_windows_conv"):
        info, arrays = recorded(name)
        for row, over in enumerate(info["configs"]):
            config = info["config_defaults"] | over
            counts = arrays["metrics_f64"][row, :, -1]
            for layer, count in zip(info["layer_names"], counts, strict=True):
                shape = arrays[f"param/{layer}.weight"].shape
                cut = windows_of(config)
                layer = Layer("", axes_of(shape, cut is not None))
                geometry = cut_of(layer, shape, cut)
                if np.isfinite(count) and not has_floor(config):
                    assert geometry.eigenvalue_count == count


@pytest.mark.parametrize("name", FARMS)
def test_older_records_and_their_rates(name):
    """Every configuration, and the rates of all parameters; float32 alone."""
    info, arrays = recorded(name)
    net, place = family.net(name), info["metric_columns"].index
    layers, found, expected = [], [], []
    for row, config in enumerate(info["metric_configs"]):
        if info["metric_status_f32"][row] != "ok":
            continue
        published = arrays["metrics_f32"][row]
        kept = np.isfinite(published[:, 0])  # There the small ones are dropped first.
        names = [x for x, own in zip(info["layer_names"], kept, strict=True) if own]
        rows = [columns_of(name, layer, config) for layer in names]
        for column in rows[0]:
            values = [values[column] for values in rows]
            own = published[kept, place(column)]
            check("older windows", "float32", values, own, f"{name}, {row}, {column}")
        alphas, counts = (
            np.asarray([values[column] for values in rows])
            for column in ("alpha", "eigs_num")
        )
        columns: dict[str, Any] = dict.fromkeys(COLUMNS, alphas)
        columns["eigenvalue_count"] = counts
        columns["fitted"] = np.ones(len(names), bool)
        table = tb_optax.Analysis(layers=(), **columns)
        for over, rates in zip(info["lr_configs"], arrays["lr_f32"][row], strict=True):
            rule = {"esd_metric_for_tb": "alpha"} | config | over
            own, part = golden_library.selected_layers(net, rule, names)
            some = golden_library.rows_of(table, own, part)
            multipliers, tuned = golden_library.balance(some, rule)
            if tuned.sum() == 1:  # There it has an end of the map.
                assert (multipliers == 1).all()
                continue
            layers.append(own)
            found.append(multipliers)
            expected.append(rates / info["untuned_lr"])
    owners = golden_library.leaf_owners(layers, net)
    for own, multipliers, rates in zip(owners, found, expected, strict=True):
        leaves = golden_library.leaf_values(multipliers, own)
        check("rates of FARMS", "float32", leaves, rates, name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_analysis_of_windows_is_the_published_one(precision):
    """One configuration of the older records, through every stage of the library."""
    kernels, layers, expected = {}, [], []
    cut, row = windows(1.0, 32, 4, published=True), 18
    for name in FARMS:
        info, arrays = recorded(name)
        assert windows_of(info["metric_configs"][row]) == cut
        for layer, own in zip(
            info["layer_names"], arrays["metrics_f32"][row], strict=True
        ):
            kernel = arrays[f"param/{layer}.weight"]
            if not np.isfinite(own[0]) or axes_of(kernel.shape) == SWAPPED:
                continue
            path = f"{name}:{layer}"
            kernels[path] = kernel.astype(DTYPES[precision])
            layers.append(Layer(path, axes_of(kernel.shape)))
            expected.append(own[:6])
    analyze = tb_optax.layer_analysis(layers, windows=cut, min_eigenvalues=0)
    with golden_library.precision(precision):
        table = jax.device_get(analyze(jax.tree.map(jnp.asarray, kernels)))
    assert table.fitted.sum() >= len(layers) - (3 if precision == "float32" else 0)
    found = [table.alpha, table.alpha_hat, table.ks_distance]
    found += [table.spectral_norm**2, table.frobenius_norm**2, table.stable_rank]
    for column, own in zip(np.asarray(found), np.asarray(expected).T, strict=True):
        kept = table.fitted
        check("windows, whole", precision, column[kept], own[kept], "", 1e-4)


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
ANALYZE = tb_optax.layer_analysis(LAYERS, windows=CUT, min_eigenvalues=1)


def test_a_windowed_analysis_is_one_of_its_windows():
    """Every column, from spectra by NumPy; the table says what was cut."""
    table = ANALYZE(KERNELS)
    for i, layer in enumerate(LAYERS):
        kernel = KERNELS[layer.path]
        (entries,) = entries_of(((kernel.shape, layer.axes),), CUT)
        rows = spectra(kernel, entries)
        rows = rows * (0.5 if layer.axes.pooled else 1)
        own = by_numpy(rows, {"pl_fitting": "median", "xmin_pos": 2})
        np.testing.assert_allclose(table.alpha[i], own["alpha"], rtol=1e-4)
        np.testing.assert_allclose(table.ks_distance[i], own["D"], atol=1e-3)
        top, norm = np.sqrt(own["spectral_norm"]), np.sqrt(own["norm"])
        np.testing.assert_allclose(table.spectral_norm[i], top, rtol=1e-5)
        np.testing.assert_allclose(table.frobenius_norm[i], norm, rtol=1e-5)
        np.testing.assert_allclose(table.stable_rank[i], own["stable_rank"], rtol=1e-5)
        assert table.eigenvalue_count[i] == own["eigs_num"]
    # All are square, and random: alpha does not depend on the shape of the kernel.
    np.testing.assert_allclose(table.random_alpha, 2.15, atol=0.06)
    np.testing.assert_allclose(table.alpha, table.random_alpha, rtol=0.1)


def test_a_spread_refresh_reads_the_same_windows():
    tx = tb_optax.scale_by_temp_balance(ANALYZE, interval=3, spread=True)
    state: Any = tx.init(KERNELS)
    update = jax.jit(tx.update)
    for params in [KERNELS] + [jax.tree.map(jnp.sin, KERNELS)] * 3:
        _, state = update(params, state, params)
    expected = ANALYZE(jax.tree.map(jnp.sin, KERNELS))
    np.testing.assert_allclose(state.alpha, expected.alpha, rtol=1e-5)
    np.testing.assert_allclose(state.multipliers, expected.multipliers, atol=1e-4)


def test_what_no_window_reads_still_makes_a_kernel_unfit():
    """The last 12 rows of a convolution of 24 x 60 are in no block."""
    broken = KERNELS | {"conv": KERNELS["conv"].at[0, 0, 0, -1].set(jnp.nan)}
    table = ANALYZE(broken)
    assert table.fitted.tolist() == [False, True, True]
    assert table.alpha[0] == 0
    dead = KERNELS | {"conv": KERNELS["conv"].at[..., :24].set(0)}
    table = ANALYZE(dead)  # One of two blocks is zero: the other one tells.
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": None}, "need count or step"),
        ({"count": 3, "step": 2}, "need count or step"),
        ({"count": 1, "published": True}, "count must be an int >= 2"),
    ],
)
def test_what_makes_no_windows_raises(options, message):
    with pytest.raises(ValueError, match=message):
        windows(**options)


def test_windows_are_not_estimated():
    spectrum = tb_optax.quadrature()
    with pytest.raises(ValueError, match=r"pass spectrum=exact\(\)"):
        tb_optax.layer_analysis(windows=windows(), spectrum=spectrum)
