"""Quadrature: the recurrence, its nodes and weights, and what products it asks for."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spectra
from spectra import eps_of

from tb_optax import Layer, MatrixAxes, fit_median
from tb_optax.lanczos import (
    Operator,
    gauss_quadrature,
    lanczos,
    quadrature,
    quadrature_spectra,
    sign_probes,
)

DENSE = MatrixAxes((0,), (1,))
EPS = eps_of(np.float32)


# --- the recurrence -----------------------------------------------------------------


def of_diagonal(values, steps, seed, probes):
    """Probes, recurrence, nodes and weights of a diagonal matrix in float32."""
    start = unit_rows(np.random.default_rng(seed), 1, probes, len(values))
    start, values = (jnp.asarray(x, jnp.float32) for x in (start, values))
    rows = lanczos(lambda q: q * values[None, None], start, steps)
    recurrence = [row[0] for row in rows]
    nodes, weights = gauss_quadrature(*recurrence)
    return map(np.asarray, (start[0], *recurrence, nodes, weights))


def unit_rows(rng, *shape):
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.usefixtures("x64")
def test_polynomials_below_degree_2k_are_integrated_exactly():
    """The law of Gauss: Σ τ_j θ_j^d = qᵀ A^d q for d < 2k, and not for d = 2k."""
    rng = np.random.default_rng(0)
    steps = 5
    halves = rng.normal(size=(2, 30, 20)) / math.sqrt(30)
    matrices = np.einsum("mki,mkj->mij", halves, halves)
    start = unit_rows(rng, 2, 3, 20)
    rows = lanczos(
        lambda q: jnp.einsum("mpn,mnk->mpk", q, matrices), jnp.asarray(start), steps
    )
    pairs = gauss_quadrature(*(row.reshape(-1, steps) for row in rows))
    nodes, weights = (np.asarray(x).reshape(2, 3, steps) for x in pairs)
    power = start
    for degree in range(2 * steps + 1):
        found = (weights * nodes**degree).sum(axis=-1)
        expected = (start * power).sum(axis=-1)
        if degree < 2 * steps:
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        else:
            assert (np.abs(found / expected - 1) > 1e-8).all()
        power = np.einsum("mpn,mnk->mpk", power, matrices)


@pytest.mark.parametrize(
    ("eigenvalues", "distinct"),
    [
        (np.zeros(40), 1),
        (np.ones(40), 1),
        (3.0 * (np.arange(40) == 7), 2),
        (np.repeat([1e-3, 1], 20), 2),
    ],
    ids=["zero", "identity", "rank one", "two values"],
)
def test_a_recurrence_that_breaks_down_ends(eigenvalues, distinct):
    """It ends once the distinct eigenvalues are found; their weights are whole."""
    start, diagonal, beside, nodes, weights = of_diagonal(eigenvalues, 10, 2, 4)
    assert not beside[:, distinct - 1 :].any()
    assert not diagonal[:, distinct:].any()
    assert (beside[:, : distinct - 1] > 0).all()
    for value in np.unique(eigenvalues):
        near = np.abs(nodes - value) <= 20 * EPS * max(eigenvalues.max(), EPS)
        there = start[:, eigenvalues == value] ** 2
        found = np.where(near, weights, 0).sum(axis=-1)
        np.testing.assert_allclose(found, there.sum(axis=-1), atol=20 * EPS)


@pytest.mark.parametrize("values", [[0, 1, 2, 7], [1e-4, 1e-2, 1]], ids=str)
def test_rounding_noise_after_the_last_residual_has_no_weight(values):
    """Where noise leads on, its nodes get next to nothing of the weight."""
    eigenvalues = np.repeat(values, 60 // len(values))
    *_, nodes, weights = of_diagonal(eigenvalues, 10, 9, 4)
    distances = np.abs(nodes[..., None] - np.asarray(values)).min(axis=-1)
    far = distances > 20 * EPS * max(values)
    assert np.where(far, weights, 0).max() < EPS


def test_all_vectors_stay_orthogonal():
    """Without reorthogonalization, copies of large eigenvalues would return."""
    small = np.random.default_rng(3).uniform(0, 1, 198)
    *_, nodes, _ = of_diagonal(np.concatenate([[1e4, 3e3], small]), 40, 3, 2)
    assert ((nodes > 10).sum(axis=-1) == 2).all()
    np.testing.assert_allclose(nodes[:, -2:], [[3e3, 1e4]] * 2, rtol=4 * EPS)


# --- products -----------------------------------------------------------------------

# Kernels of every kind: smaller side in or out, pooled, stacked in the middle, parts.
CASES = {
    "wide": ((6, 9), DENSE, None),
    "tall": ((9, 6), DENSE, None),
    "heads": ((5, 3, 4), MatrixAxes((0,), (1, 2)), None),
    "heads out": ((3, 4, 5), MatrixAxes((0, 1), (2,)), None),
    "conv": ((3, 2, 4, 5), MatrixAxes((2,), (3,), pooled=(0, 1)), None),
    "equinox conv": ((5, 4, 3, 2), MatrixAxes((1,), (0,), pooled=(2, 3)), None),
    "stack": ((2, 6, 4), MatrixAxes((1,), (2,), stacked=(0,)), None),
    "inner stack": ((6, 2, 4), MatrixAxes((0,), (2,), stacked=(1,)), None),
    "conv stack": (
        (2, 3, 3, 4, 5),
        MatrixAxes((3,), (4,), pooled=(1, 2), stacked=(0,)),
        None,
    ),
    "small part": ((9, 8), DENSE, (1, 2, 5)),
    "large part": ((3, 8), DENSE, (1, 1, 6)),
    "part of heads": ((4, 3, 5), MatrixAxes((0,), (1, 2)), (1, 1, 2)),
}
TYPES = ("float32", "bfloat16", "float16")


def make(case, scale, dtype):
    """The operator of a kernel, and its matrices, wide ones, in float64."""
    shape, axes, part = CASES[case]
    rng = np.random.default_rng(4)
    kernel = jnp.asarray(scale * rng.normal(size=shape), dtype)
    whole = np.asarray(kernel, np.float64)
    if part is not None:
        whole = whole.take(range(*part[1:]), part[0])
    order = axes.stacked + axes.pooled + axes.reduction + axes.output
    sizes = [whole.shape[axis] for axis in order]
    batch = len(axes.stacked + axes.pooled)
    rows = math.prod(sizes[batch : batch + len(axes.reduction)])
    matrices = whole.transpose(order).reshape(math.prod(sizes[:batch]), rows, -1)
    if rows > matrices.shape[2]:
        matrices = matrices.swapaxes(1, 2)
    return Operator(kernel, axes, part), matrices


@pytest.mark.parametrize(
    ("case", "scale", "dtype"),
    [
        *((case, 1.0, "float32") for case in CASES),
        ("conv", 1e-30, "float32"),
        ("small part", 3e37, "float32"),
        ("stack", 1e-30, "bfloat16"),
        ("part of heads", 3e37, "bfloat16"),
        ("heads", 1.0, "float16"),
        ("conv", 1.0, "float64"),
    ],
)
@pytest.mark.usefixtures("x64")
def test_products_are_those_of_numpy(case, scale, dtype):
    """To the accuracy of float32 or float64, whatever the kernel's type and scale."""
    operator, matrices = make(case, scale, dtype)
    own = np.float64 if dtype == "float64" else np.float32
    eps = eps_of(own)
    count, n, _ = matrices.shape
    assert (operator.count, operator.n) == (count, n)
    exponent, finite, square_sum = jax.jit(operator.measure)()
    assert np.asarray(finite).all()
    scaled = matrices * 2.0 ** -np.asarray(exponent, np.float64)[:, None, None]
    top = np.abs(scaled).max(axis=(1, 2))
    assert (top < 2).all()
    if operator.part is None:
        assert (top >= 1).all()
    np.testing.assert_allclose(square_sum, (scaled**2).sum(axis=(1, 2)), rtol=8 * eps)
    vectors = unit_rows(np.random.default_rng(5), count, 3, n).astype(own)
    expected = np.einsum("mpi,mik,mjk->mpj", vectors.astype(np.float64), scaled, scaled)
    found = jax.jit(operator.product)(jnp.asarray(vectors), exponent)
    assert found.dtype == own
    np.testing.assert_allclose(found, expected, atol=16 * eps * np.abs(expected).max())


@pytest.mark.parametrize("dtype", TYPES)
def test_one_number_that_is_not_finite_is_found_anywhere(dtype):
    """Maxima of XLA may pass over NaN."""
    kernels = np.tile(np.float32(0.5), (40, 33, 50))
    for i in range(39):
        kernels[i].flat[41 * i + i // 3] = (math.nan, math.inf, -math.inf)[i % 3]
    stack = Operator(jnp.asarray(kernels, dtype), CASES["stack"][1])
    exponent, finite, square_sum = map(np.asarray, jax.jit(stack.measure)())
    assert finite.tolist() == [False] * 39 + [True]
    assert not square_sum[:-1].any()
    assert exponent[-1] == -1


def test_probes_are_signs_that_stay():
    """Equal at each call; almost orthogonal, those of each pooled matrix too."""
    probes = np.asarray(sign_probes(9, 8, 64))
    np.testing.assert_array_equal(np.abs(probes), np.float32(1 / 8))
    np.testing.assert_array_equal(probes, sign_probes(9, 8, 64))
    rows = probes.reshape(-1, 64)
    overlaps = np.abs(rows @ rows.T - np.eye(len(rows)))
    assert overlaps.max() < 5 / math.sqrt(64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_kernel_is_copied(dtype):
    """Not cast, not transposed, not cut: only the vectors take memory."""
    stack = MatrixAxes((1,), (2,), stacked=(0,))
    kernels = {
        "dense": jax.ShapeDtypeStruct((640, 1500), dtype),
        "stack": jax.ShapeDtypeStruct((3, 1500, 640), dtype),
        "fused": jax.ShapeDtypeStruct((640, 1280), dtype),
    }
    layers = [Layer("dense", DENSE)]
    layers += [Layer("stack", stack, index=(i,)) for i in (0, 2)]
    layers += [Layer("fused", DENSE, part=(1, i, i + 640)) for i in (0, 640)]

    @jax.jit
    def estimate(kernels):
        return quadrature_spectra(kernels, layers, 0.5, quadrature(probes=2, steps=4))

    memory = estimate.lower(kernels).compile().memory_analysis()
    assert memory is not None
    vectors = 6 * 2 * 4 * 640 * 4
    found = memory.temp_size_in_bytes
    assert found <= 4 * vectors + 2 * 8 * 1500 * 4 < 640 * 640 * 2


# --- densities and their fit --------------------------------------------------------


def fit(log_nodes, weights, count, **options):
    arrays = (jnp.asarray(x, jnp.float32) for x in (log_nodes, weights))
    fitting = functools.partial(
        fit_median(**options).fit_weighted, count=np.asarray(count)
    )
    return jax.jit(fitting)(*arrays)


@pytest.mark.parametrize("include_threshold", [True, False])
@pytest.mark.parametrize("position", [2, 1.25])
@pytest.mark.parametrize("count", [9, 1000])
def test_single_eigenvalues_as_nodes_are_fitted_as_ever(
    count, position, include_threshold
):
    """N nodes of weight 1/N give the same xmin and tail, and nearly the same alpha."""
    logs = np.log(spectra.pareto_quantiles(2.5, count))
    options = {"position": position, "include_threshold": include_threshold}
    law = fit(logs[None, None], np.full((1, 1, count), 1 / count), [count], **options)
    known = fit_median(**options)(
        jnp.asarray(logs[None], jnp.float32), jnp.ones((1, count), bool)
    )
    assert law.tail_size[0] == known.tail_size[0]
    np.testing.assert_allclose(law.xmin, known.xmin, rtol=64 * EPS)
    # The largest eigenvalue is a value, and not half a cell above itself.
    np.testing.assert_allclose(law.alpha, known.alpha, rtol=1.2 / count)
    assert law.ks_distance[0] == 0


def random_density(seed=7, samples=3, nodes=12):
    rng = np.random.default_rng(seed)
    logs = np.sort(rng.normal(size=(1, samples, nodes)), axis=-1)
    weights = rng.dirichlet(np.ones(nodes), size=(1, samples)) / samples
    return logs, weights


def test_xmin_and_excess_are_those_of_the_mean_density():
    """By NumPy's interpolation of each distribution function, and a fine sum."""
    logs, weights = random_density()
    law = fit(logs, weights, [1000])
    grid = np.linspace(logs.min() - 0.1, logs.max() + 0.1, 2_000_001)
    total = weights.sum(axis=-1)
    distribution = np.sum(
        [
            np.interp(grid, x, np.cumsum(w) - w / 2, left=0, right=t)
            for x, w, t in zip(logs[0], weights[0], total[0], strict=True)
        ],
        axis=0,
    )
    threshold = grid[np.searchsorted(distribution, 0.5005)]
    start = int(np.searchsorted(distribution, 0.5))
    excess = (1 - distribution[start:]).sum() * (grid[1] - grid[0])
    excess += 0.5 * (grid[start] - threshold)
    assert math.log(law.xmin[0]) == pytest.approx(threshold, abs=1e-5)
    assert law.alpha[0] == pytest.approx(1 + 0.5 / excess, rel=1e-5)
    assert law.tail_size[0] == 500


def test_the_scale_the_order_of_samples_and_padding_do_not_matter():
    logs, weights = random_density()
    law = fit(logs, weights, [400])
    moved = fit(logs + 3, weights, [400])
    np.testing.assert_allclose(moved.alpha, law.alpha, rtol=16 * EPS)
    np.testing.assert_allclose(moved.xmin, law.xmin * math.exp(3), rtol=16 * EPS)
    turned = fit(logs[:, ::-1], weights[:, ::-1], [400])
    np.testing.assert_allclose(turned.alpha, law.alpha, rtol=16 * EPS)
    rows, columns = np.full((1, 2, 12), -np.inf), np.full((1, 5, 4), -np.inf)
    padded = np.concatenate([columns, np.concatenate([logs, rows], axis=1)], axis=2)
    zeros = np.zeros_like(padded)
    zeros[:, :3, 4:] = weights
    law_of_padded = fit(padded, zeros, [400])
    np.testing.assert_allclose(law_of_padded.alpha, law.alpha, rtol=16 * EPS)


@pytest.mark.parametrize("zeros", [0.45, 0.55])
def test_zeros_are_not_smeared_into_the_tail(zeros):
    """No mass lies between a zero and the smallest node above it."""
    logs = np.asarray([[[-np.inf, 0, 1, 2]]])
    weights = np.asarray([[[zeros, *[(1 - zeros) / 3] * 3]]])
    law = fit(logs, weights, [10_000])
    if zeros > 0.5:
        assert (law.alpha[0], law.xmin[0], law.tail_size[0]) == (0, 0, 0)
        return
    assert law.xmin[0] == pytest.approx(1)
    # Between 0 and 1, between 1 and 2, and at 2.
    third = (1 - zeros) / 3
    excess = third * 0.5 + third * 1.5 + third / 2 * 2
    assert law.alpha[0] == pytest.approx(1 + 0.5 / excess, rel=1e-4)


def test_no_spread_and_nothing_at_all():
    """All nodes equal: alpha is infinite; all zero: there is no tail."""
    logs = np.zeros((2, 2, 3))
    logs[1] = -np.inf
    law = jax.device_get(fit(logs, np.full((2, 2, 3), 1 / 6), [30, 30]))
    assert np.isinf(law.alpha[0])
    assert law.alpha[1] == law.xmin[1] == law.tail_size[1] == 0


# --- accuracy -----------------------------------------------------------------------

SIDE = 2048


@functools.cache
def rotation():
    """A random orthogonal matrix."""
    rng = np.random.default_rng(8)
    return np.linalg.qr(rng.normal(size=(SIDE, SIDE)).astype(np.float32))[0]


def pareto(alpha):
    return lambda rng: (1 - rng.random(SIDE)) ** (-1 / (alpha - 1))


def gaussian(ratio):
    """The spectrum of a Gaussian matrix, up to its small fluctuations."""
    return lambda _: spectra.marchenko_pastur(1 / ratio, SIDE)


def spiked(rng):
    """The same, its 100 largest between e and e⁴ times as large."""
    values = spectra.marchenko_pastur(1.0, SIDE)
    values[-100:] *= np.exp(rng.uniform(1, 4, 100))
    return values


KINDS = {
    "gaussian 1:1": gaussian(1),
    "gaussian 4:1": gaussian(4),
    "pareto 2": pareto(2),
    "pareto 3": pareto(3),
    "pareto 5": pareto(5),
    "spiked": spiked,
}


@functools.cache
def alpha_of(method):
    """A jitted function from a kernel to the alpha of its estimate."""
    layers = [Layer("w", DENSE)]

    @jax.jit
    def alpha(kernel):
        estimate = quadrature_spectra({"w": kernel}, layers, 1.0, method)
        columns = (estimate.log_eigenvalues, estimate.weights, estimate.count)
        return fit_median().fit_weighted(*columns).alpha[0]

    return alpha


def errors(kind, seeds, method):
    """Relative errors of alpha over kernels of random bases with known eigenvalues.

    The kernel's columns are random orthogonal directions, to which the eigenvalues are
    dealt out in random order: another basis for each seed.
    """
    found = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        values = np.sort(KINDS[kind](rng))
        sigma = np.sqrt(rng.permutation(values)).astype(np.float32)
        alpha = alpha_of(method)(jnp.asarray(rotation() * sigma))
        found.append(float(alpha) / spectra.hill(values, SIDE // 2) - 1)
    return np.asarray(found)


@pytest.mark.parametrize(
    ("seeds", "method", "goal"),
    [
        (2, quadrature(), 0.025),
        pytest.param(10, quadrature(), 0.025, marks=pytest.mark.long),
        pytest.param(10, quadrature(probes=32, steps=64), 0.01, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_of_large_kernels(kind, seeds, method, goal):
    found = errors(kind, range(seeds), method)
    rms, largest = np.sqrt(np.mean(found**2)), np.abs(found).max()
    print(f"{kind}: rms {rms:.2%}, largest {largest:.2%}, {method}")
    assert rms <= goal
    assert largest <= 0.05
