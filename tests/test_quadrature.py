"""An analysis that estimates the spectra of large kernels, and the training with it."""

import dataclasses
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import spectra
from layer_table import (
    DENSE,
    EXPANDED,
    LAYERS,
    analyze,
    assert_same,
    columns_of,
    make_kernels,
)
from spectra import eps_of, float32
from test_analysis_faults import BAD, SQUARE, check_not_fitted, with_square

import tb_optax
from tb_optax import (
    Layer,
    MatrixAxes,
    PowerLaw,
    fit_median,
    fit_min_ks,
    fit_peak,
    layer_analysis,
    quadrature,
)
from tb_optax.lanczos import quadrature_spectra

# Kernels are analyzed one at a time here, to read their alphas.
pytestmark = pytest.mark.filterwarnings("ignore:only one layer can be tuned")

EPS = eps_of(np.float32)
# Every kernel of the zoo is large.
ALL = quadrature(above=0)
STACK = MatrixAxes((1,), (2,), stacked=(0,))
CONV = MatrixAxes((2,), (3,), pooled=(0, 1))
# Columns that no estimate touches, but for rounding.
EXACT = ("frobenius_norm", "eigenvalue_count")


def heavy(seed, *shape):
    """A kernel with heavy tails."""
    rng = np.random.default_rng(seed)
    return float32(rng.normal(size=shape) * (1 + np.arange(shape[-1])) ** -0.5)


def table(kernels, layers, **options):
    options.setdefault("spectrum", ALL)
    return layer_analysis(layers, **options)(kernels)


# --- construction -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": fit_min_ks()}, r"fit = fit_min_ks\(\) needs .*fit_median.*exact\(\)"),
        ({"fit": fit_peak()}, r"fit = fit_peak\(.*\) needs .*exact\(\)"),
        ({"fit": lambda *_: None}, r"fit = <function.*> needs .*fit_median"),
        ({"metric": "ks_distance"}, r"metric = 'ks_distance' needs .*another metric"),
        ({"eigenvalue_floor": 1e-5}, r"eigenvalue_floor = 1e-05 needs .*leave it out"),
    ],
    ids=["min KS", "peak", "own fit", "metric", "floor"],
)
def test_what_needs_single_eigenvalues_raises(options, message):
    layer_analysis(**options)
    with pytest.raises(ValueError, match=message):
        layer_analysis(spectrum=quadrature(), **options)


def test_equal_options_are_equal_analyses():
    one, other = (layer_analysis(LAYERS, spectrum=quadrature()) for _ in range(2))
    assert one == other
    assert one != layer_analysis(LAYERS)


def test_max_dim_binds_only_what_is_decomposed():
    kernels = {"small": heavy(0, 60, 70), "large": heavy(1, 80, 90)}
    layers = [Layer(name, DENSE) for name in kernels]
    with pytest.raises(ValueError, match=r"'large' .*80 x 80.*spectrum=quadrature\(\)"):
        layer_analysis(layers, max_dim=70)(kernels)
    with pytest.raises(ValueError, match=r"'small' .*60 x 60.*max_dim = 50"):
        table(kernels, layers, max_dim=50, spectrum=quadrature(above=70))
    assert table(
        kernels, layers, max_dim=60, spectrum=quadrature(above=60)
    ).fitted.all()


@dataclasses.dataclass(frozen=True)
class Mean:
    """A fit of the user that takes weights: alpha is 2 plus the mean of λ."""

    def __call__(self, log_eigenvalues, valid):
        """Fit eigenvalues."""
        mean = jnp.mean(jnp.exp(log_eigenvalues), axis=-1, where=valid)
        return self._law(mean, valid.sum(axis=-1))

    def fit_weighted(self, log_nodes, weights, count):
        """Fit nodes."""
        mean = jnp.sum(jnp.exp(log_nodes) * weights, axis=(1, 2))
        return self._law(mean, jnp.asarray(count))

    def _law(self, mean, count):
        return PowerLaw(2 + mean, jnp.ones_like(mean), 0 * mean, count)


def test_a_fit_of_the_user_that_takes_weights():
    """It is given nodes in the unit of the eigenvalues that it would be given."""
    kernels = {"w": float32(np.random.default_rng(2).normal(size=(200, 400)))}
    layers = [Layer("w", DENSE)]
    found = table(kernels, layers, fit=Mean())
    known = layer_analysis(layers, fit=Mean())(kernels)
    assert known.alpha[0] > 10
    # The mean of eight forms qᵀAq, each with variance 2·mean λ² / n, is within 0.04.
    np.testing.assert_allclose(found.alpha, known.alpha, rtol=0.12)


def test_a_fit_of_the_user_with_a_wrong_shape_raises():
    class Wrong(Mean):
        def fit_weighted(self, log_nodes, weights, count):
            """Fit nothing."""
            del weights, count
            return PowerLaw(*[log_nodes[0]] * 4)

    with pytest.raises(ValueError, match=r"fit \(alpha\) must return shape \(1,\)"):
        table({"w": heavy(2, 20, 20)}, [Layer("w", DENSE)], fit=Wrong())


# --- the table ----------------------------------------------------------------------


def test_rows_of_small_kernels_are_as_ever():
    """To the bit, in the order of the layers, whatever is estimated between them."""
    kernels = make_kernels(0)
    mixed = analyze(kernels, spectrum=quadrature(above=20))
    known = analyze(kernels)
    large = np.asarray(
        [min(x.matrix_shape(np.shape(kernels[x.path]))) > 20 for x in EXPANDED]
    )
    assert 0 < large.sum() < len(large)
    assert mixed.layers == known.layers
    names = set(columns_of(mixed)) - {"multipliers"}
    assert_same(mixed, known, names, rows=~large)
    assert (np.asarray(mixed.ks_distance)[large] == 0).all()
    assert (np.asarray(mixed.alpha)[large] != np.asarray(known.alpha)[large]).all()


@pytest.mark.parametrize(
    "fit",
    [fit_median(), fit_median(position=4), fit_median(include_threshold=False)],
    ids=str,
)
def test_columns_against_the_exact_ones(fit):
    """Kernels of some hundred rows, of every shape; many steps and probes."""
    kernels = {
        "dense": heavy(3, 150, 220),
        "tall": heavy(4, 260, 180),
        "conv": heavy(5, 2, 2, 150, 180),
        "scan": heavy(6, 2, 150, 180),
    }
    axes = {"conv": CONV, "scan": STACK}
    layers = [Layer(name, axes.get(name, DENSE)) for name in kernels]
    known = layer_analysis(layers, fit=fit)(kernels)
    found = table(kernels, layers, fit=fit, spectrum=quadrature(0, 32, 64))
    assert found.fitted.all()
    assert found.tuned.all()
    np.testing.assert_array_equal(found.tail_size, known.tail_size)
    for name in EXACT:
        np.testing.assert_allclose(
            getattr(found, name), getattr(known, name), rtol=84 * EPS
        )
    np.testing.assert_allclose(found.alpha, known.alpha, rtol=0.05)
    np.testing.assert_allclose(found.alpha_hat, known.alpha_hat, rtol=0.05)
    np.testing.assert_allclose(found.xmin, known.xmin, rtol=0.15)
    norm = np.asarray(found.spectral_norm) / np.asarray(known.spectral_norm)
    assert (norm <= 1 + 84 * EPS).all()
    assert (norm >= 1 - 1e-3).all()
    np.testing.assert_allclose(found.stable_rank, known.stable_rank, rtol=2e-3)


def test_the_largest_node_falls_short_by_no_more_than_promised():
    """The bound of Kuczyński and Woźniakowski, on the hardest spectrum: no gap."""
    n, steps = 400, 12
    rng = np.random.default_rng(7)
    sigma = np.sqrt(1 - (np.arange(n) / n) ** 2)[::-1]
    kernel = float32(spectra.with_singular_values(rng, sigma, n, n))
    layers = [Layer("w", DENSE)]
    found = table({"w": kernel}, layers, spectrum=quadrature(0, 1, steps))
    shortfall = 1 - float(found.spectral_norm[0]) ** 2
    bound = 0.103 * (math.log(n * (steps - 1) ** 4) / (steps - 1)) ** 2
    assert 1e-4 < shortfall < bound


@pytest.mark.parametrize("exponent", [-100, 90])
def test_powers_of_two_change_no_bit(exponent):
    kernels = {"w": heavy(8, 96, 128), "conv": heavy(9, 2, 2, 64, 70)}
    layers = [Layer("w", DENSE), Layer("conv", CONV)]
    analysis = layer_analysis(layers, spectrum=ALL)
    scaled = {
        name: np.ldexp(kernel, exponent).astype(np.float32)
        for name, kernel in kernels.items()
    }
    fits = ("alpha", "tail_size", "stable_rank", "fitted", "multipliers")
    assert_same(analysis(scaled), analysis(kernels), fits)


def test_the_same_bits_each_time_jitted_or_not():
    kernels = make_kernels(1)
    analysis = layer_analysis(LAYERS, spectrum=ALL, min_eigenvalues=20)
    first = analysis(kernels)
    assert_same(analysis(kernels), first)
    assert_same(jax.jit(analysis.__call__)(kernels), first)
    jax.clear_caches()
    assert_same(analysis(kernels), first)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_read_like_its_float32_copy(dtype):
    kernels = {"w": jnp.asarray(heavy(10, 120, 200), dtype)}
    layers = [Layer("w", DENSE)]
    found = table(kernels, layers)
    known = table({"w": kernels["w"].astype(jnp.float32)}, layers)
    assert found.alpha.dtype == jnp.float32
    np.testing.assert_allclose(found.alpha, known.alpha, rtol=1e-5)
    np.testing.assert_allclose(found.frobenius_norm, known.frobenius_norm, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_double_precision():
    kernel = np.asarray(heavy(11, 120, 200), np.float64)
    layers = [Layer("w", DENSE)]
    found = table({"w": kernel}, layers)
    single = table({"w": kernel.astype(np.float32)}, layers)
    assert found.alpha.dtype == jnp.float64
    np.testing.assert_allclose(found.alpha, single.alpha, rtol=1e-4)
    top = np.linalg.norm(kernel, 2)
    assert found.spectral_norm[0] == pytest.approx(top, rel=1e-10)


@pytest.mark.usefixtures("x64")
def test_dtypes_mixed_in_one_tree():
    """Each kernel is read in its own precision, and has the noise of its own."""
    sigma = np.linspace(1, 3, 80) * (np.arange(80) >= 50)
    low = spectra.with_singular_values(np.random.default_rng(27), sigma, 80, 80)
    kernels = {
        "half": jnp.asarray(heavy(28, 80, 90), jnp.bfloat16),
        "single": jnp.asarray(heavy(29, 80, 90), jnp.float32),
        "double": jnp.asarray(heavy(30, 80, 90), jnp.float64),
        "low single": jnp.asarray(low, jnp.float32),
        "low double": jnp.asarray(low, jnp.float64),
    }
    layers = [Layer(name, DENSE) for name in kernels]
    found = table(kernels, layers)
    assert found.alpha.dtype == jnp.float64
    assert found.fitted.tolist() == [True] * 3 + [False] * 2
    for row in range(3):
        alone = table(kernels, layers[row : row + 1])
        tolerance = 1e-10 if row == 2 else 1e-5
        np.testing.assert_allclose(found.alpha[row], alone.alpha[0], rtol=tolerance)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_it_lowers_for_every_platform(platform):
    analysis = layer_analysis([Layer("w", DENSE)], spectrum=quadrature(above=8))
    kernels = {"w": jnp.ones((40, 50), jnp.bfloat16)}
    exported = jax.export.export(jax.jit(analysis.__call__), platforms=(platform,))(
        kernels
    )
    assert exported.platforms == (platform,)


# --- layers of every kind -----------------------------------------------------------


def test_slices_parts_and_transposes_are_read_like_kernels_of_their_own():
    """The same density, whichever way the kernel holds the matrix."""
    matrix, other = heavy(12, 80, 100), heavy(13, 80, 100)
    alone = float(table({"w": matrix}, [Layer("w", DENSE)]).alpha[0])
    kernels = {
        "tall": matrix.T,
        "stack": np.stack([other, matrix, other]),
        "inner": np.stack([other, matrix], axis=1),
        "fused": np.concatenate([other, matrix, other[:, :50]], axis=1),
        "fused tall": np.concatenate([matrix.T, other.T], axis=1),
        "heads": matrix.reshape(80, 4, 25),
        "conv": matrix.reshape(1, 1, 80, 100),
    }
    layers = [
        Layer("tall", DENSE),
        Layer("stack", STACK, index=(1,)),
        Layer("inner", MatrixAxes((0,), (2,), stacked=(1,)), index=(1,)),
        Layer("fused", DENSE, part=(1, 100, 200)),
        Layer("fused tall", DENSE, part=(1, 0, 80)),
        Layer("heads", MatrixAxes((0,), (1, 2))),
        Layer("conv", CONV),
    ]
    found = table(kernels, layers)
    assert found.fitted.all()
    np.testing.assert_allclose(found.alpha, alone, rtol=1e-5)
    norms = np.full(7, np.linalg.norm(matrix)) * np.where(
        np.arange(7) == 6, 0.5**0.5, 1
    )
    np.testing.assert_allclose(found.frobenius_norm, norms, rtol=8 * EPS)


@pytest.mark.parametrize("asked", [[5], [1, 2, 3, 4], [3, 2]], ids=str)
def test_slices_of_a_stack_in_any_order(asked):
    """Whether or not the others are left out of the products."""
    stack = heavy(14, 6, 60, 70)
    whole = table({"w": stack}, [Layer("w", STACK)])
    layers = [Layer("w", STACK, index=(i,)) for i in asked]
    found = table({"w": stack}, layers)
    np.testing.assert_allclose(found.alpha, np.asarray(whole.alpha)[asked], rtol=1e-5)


def test_pooled_matrices_weigh_the_same():
    """The nodes of each have its own mean eigenvalue, in the unit of the layer."""
    kernel = heavy(15, 2, 1, 70, 90)
    kernel[1] *= 8
    layers = [Layer("w", CONV)]
    pooled = quadrature_spectra({"w": jnp.asarray(kernel)}, layers, 1.0, ALL)
    unit = 4.0 ** np.asarray(pooled.exponent, np.float64)[0]
    logs, weights = (np.asarray(x, np.float64)[0] for x in pooled[:2])
    assert logs.shape == (2 * ALL.probes, ALL.steps)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=1), 1 / 16, rtol=1e-5)
    for position in range(2):
        own = slice(position * ALL.probes, (position + 1) * ALL.probes)
        mean = (np.exp(logs[own]) * weights[own]).sum() * 2 * unit
        matrix = kernel[position, 0].astype(np.float64)
        # A quadratic form of a random sign vector scatters about the trace.
        gram = matrix @ matrix.T
        scatter = math.sqrt(2 * (gram**2).sum() / ALL.probes) / 70
        assert abs(mean - np.trace(gram) / 70) < 4 * scatter
    assert pooled.count.tolist() == [140]


def test_pooled_kernels_with_a_zero_matrix():
    """A dead position counts as zeros, of which half a spectrum may consist."""
    kernel = heavy(16, 3, 1, 60, 80)
    kernel[1] = 0
    known = layer_analysis([Layer("w", CONV)])({"w": kernel})
    found = table({"w": kernel}, [Layer("w", CONV)])
    assert known.fitted[0]
    assert found.fitted[0]
    np.testing.assert_allclose(found.alpha, known.alpha, rtol=0.08)
    kernel[2] = 0
    check_not_fitted(table({"w": kernel}, [Layer("w", CONV)]), 0)


# --- faults -------------------------------------------------------------------------


def test_bad_kernels_are_not_fitted_and_touch_no_other_layer():
    """The same table of faults as for exact spectra."""
    healthy = analyze(with_square(lambda _, kernel: kernel), spectrum=ALL)
    others = np.arange(len(EXPANDED)) != SQUARE
    assert np.asarray(healthy.tuned).sum() > 3
    for name, make in BAD.items():
        kernels = with_square(make)
        analysis = analyze(kernels, spectrum=ALL)
        check_not_fitted(analysis, SQUARE)
        fits = set(columns_of(analysis)) - {"multipliers"}
        assert_same(analysis, healthy, fits, rows=others)
        if name in ("nan", "inf", "-inf", "all nan", "zero"):
            for column in ("spectral_norm", "frobenius_norm", "stable_rank"):
                assert getattr(analysis, column)[SQUARE] == 0
        else:
            top = np.linalg.norm(kernels["square"].astype(np.float64), 2)
            assert analysis.spectral_norm[SQUARE] == pytest.approx(top, rel=84 * EPS)


@pytest.mark.parametrize("share", [0.05, 0.4, 0.6, 0.9])
def test_low_rank(share):
    """Fitted if and only if more than half of the eigenvalues are not zero."""
    n = 300
    rng = np.random.default_rng(17)
    sigma = np.linspace(1, 3, n) * (np.arange(n) >= n - int(share * n))
    kernel = float32(1e-25 * spectra.with_singular_values(rng, sigma, n, n))
    layers = [Layer("w", DENSE)]
    found = table({"w": kernel}, layers)
    known = layer_analysis(layers)({"w": kernel})
    assert found.fitted[0] == known.fitted[0] == (share > 0.5)
    if share < 0.5:
        check_not_fitted(found, 0)
    else:
        np.testing.assert_allclose(found.alpha, known.alpha, rtol=0.06)


@pytest.mark.parametrize("size", [96, 700])
def test_few_distinct_eigenvalues(size):
    """Where the recurrence ends early there is no density."""
    rng = np.random.default_rng(18)
    made = {
        "orthogonal": spectra.orthonormal(rng, size, size),
        "scaled identity": 3e-15 * np.eye(size),
        "constant": np.full((size, size), 0.1),
        "outer": np.outer(rng.normal(size=size), rng.normal(size=size)),
    }
    kernels = {name: float32(kernel) for name, kernel in made.items()}
    found = table(kernels, [Layer(name, DENSE) for name in kernels])
    for row in range(len(kernels)):
        check_not_fitted(found, row)


def test_no_nan_on_the_way():
    kernels = {"stack": heavy(19, 6, 60, 50)}
    kernels["stack"][0] = math.nan
    kernels["stack"][1] = np.eye(60, 50)
    kernels["stack"][2, 4, 4] = math.inf
    kernels["stack"][3] = 0
    kernels["stack"][4] = 0.5
    with jax.debug_nans(True):
        analysis = jax.block_until_ready(table(kernels, [Layer("stack", STACK)]))
    for row in range(5):
        check_not_fitted(analysis, row)
    assert analysis.tuned[5]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 40), (33, 31)], ids=str)
def test_tiny_kernels(shape):
    """With fewer rows than steps, nodes are eigenvalues; all columns stay finite."""
    kernel = heavy(20, *shape)
    found = table({"w": kernel}, [Layer("w", DENSE)], min_eigenvalues=1)
    for name, column in columns_of(found).items():
        assert np.isfinite(column).all(), name
    assert found.eigenvalue_count[0] == min(shape)
    top = np.linalg.norm(kernel.astype(np.float64), 2)
    assert found.spectral_norm[0] == pytest.approx(top, rel=84 * EPS)
    # A tail of one eigenvalue has no spread.
    assert found.fitted[0] == (min(shape) > 2)


# --- training -----------------------------------------------------------------------


def make_params():
    return {
        "conv": heavy(21, 2, 2, 60, 70),
        "dense": heavy(22, 60, 90),
        "fused": heavy(23, 60, 120),
        "small": heavy(24, 30, 40),
        "stack": heavy(25, 3, 60, 80),
        "other": heavy(26, 60, 80),
    }


TUNED = (
    Layer("stack", STACK),
    Layer("conv", CONV),
    Layer("small", DENSE),
    Layer("fused", DENSE, part=(1, 0, 60)),
    Layer("fused", DENSE, part=(1, 60, 120)),
    Layer("dense", DENSE),
    Layer("other", DENSE),
)
ANALYZE = layer_analysis(TUNED, spectrum=quadrature(40), min_eigenvalues=20)


def test_a_spread_refresh_is_one_of_the_parameters_as_they_are():
    """Updates of zero: a whole refresh and one in pieces come to the same alphas."""
    params = make_params()
    known = ANALYZE(params)
    assert known.fitted.all()
    tx = tb_optax.scale_by_temp_balance(ANALYZE, interval=4, spread=True)
    update = jax.jit(tx.update)
    state: Any = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = update(zeros, state, params)
    # What the first refresh, a whole one, found must not be what the pieces find.
    state = tb_optax.set_multipliers(state, [1.0] * len(known.layers))
    state = tb_optax.get_state(state)._replace(alpha=jnp.zeros_like(known.alpha))
    for _ in range(4):
        _, state = update(zeros, state, params)
    np.testing.assert_allclose(state.alpha, known.alpha, rtol=2e-6)
    np.testing.assert_allclose(state.multipliers, known.multipliers, rtol=1e-4)


@pytest.mark.parametrize("spread", [False, True])
def test_training_with_estimates(spread):
    """Inside a scanned step: the state keeps its types, and refreshes happen."""
    params = make_params()
    tx = tb_optax.temp_balance(optax.sgd(0.05), ANALYZE, interval=3, spread=spread)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return (optax.apply_updates(params, updates), state), state

    start = (jax.tree.map(jnp.asarray, params), tx.init(params))
    _, states = jax.lax.scan(step, start, length=7)
    alphas = np.asarray(tb_optax.get_state(states).alpha)
    assert (alphas[0] > 1).all()
    assert (alphas[6] != alphas[0]).all()
    assert (np.abs(alphas[6] / alphas[0] - 1) < 0.2).all()


def test_pieces_of_a_spread_refresh_cost_what_products_cost():
    """Estimates of large kernels are cheap, and many of them make one piece."""
    from tb_optax.spread import piece_starts

    shapes = {"small": (1024, 1024)} | {f"large {i}": (4096, 4096) for i in range(4)}
    layers = [Layer(name, DENSE) for name in shapes]
    # 2.3 · 1024³ = 2.5e9 against 2 · 32 · 8 · 4096² = 8.6e9 multiplications each.
    starts = piece_starts(layers, shapes, 2, quadrature())
    assert starts.tolist() == [0, 3, 5]
