"""Eigenvalues by both routes against NumPy's SVD in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spectra

import tb_optax
from tb_optax import Layer, MatrixAxes, esd, fit_median

DENSE = MatrixAxes((0,), (1,))
CONV = MatrixAxes((2,), (3,), pooled=(0, 1))
LAYERS = {
    (1, 1): DENSE,
    (1, 9): DENSE,
    (2, 2): DENSE,
    (7, 3): DENSE,
    (63, 64): DENSE,
    (64, 64): DENSE,
    (65, 64): DENSE,
    (65, 65): DENSE,
    (64, 200): DENSE,
    (3, 3, 20, 24): CONV,
    (24, 20, 3, 3): MatrixAxes((1,), (0,), pooled=(2, 3)),
    (24, 4, 5): MatrixAxes((0,), (1, 2)),
    (4, 5, 24): MatrixAxes((0, 1), (2,)),
    (3, 20, 30): MatrixAxes((1,), (2,), stacked=(0,)),
    (20, 2, 30, 2): MatrixAxes((0,), (2,), pooled=(1,), stacked=(3,)),
}
NAMED = {f"w{i}": item for i, item in enumerate(LAYERS.items())}


def stacks():
    return [Layer(name, axes) for name, (_, axes) in NAMED.items()]


def make_params(kind, dtype):
    """One kernel of every shape, its matrices with a spectrum of this kind."""
    rng = np.random.default_rng(0)
    params = {}
    for name, (shape, axes) in NAMED.items():
        groups = (axes.stacked, axes.pooled, axes.reduction, axes.output)
        sizes = [math.prod(shape[axis] for axis in group) for group in groups]
        rows, columns = sizes[2:]
        matrices = np.stack(
            [KINDS[kind](rng, rows, columns) for _ in range(math.prod(sizes[:2]))]
        )
        order = [axis for group in groups for axis in group]
        kernel = matrices.reshape([shape[axis] for axis in order])
        params[name] = jnp.asarray(np.transpose(kernel, np.argsort(order)), dtype)
    return params


def manufactured(sigma_of):
    def make(rng, rows, columns):
        sigma = sigma_of(min(rows, columns))
        return spectra.with_singular_values(rng, sigma, rows, columns)

    return make


def rank(keep):
    return lambda count: np.linspace(1, 3, max(1, int(keep * count)))


KINDS = {
    "gaussian": lambda rng, rows, columns: rng.normal(size=(rows, columns)),
    "clusters": manufactured(spectra.clusters),
    "gap": manufactured(spectra.gap),
    "decay": manufactured(lambda count: np.logspace(-3, 0, count)),
    "pareto": manufactured(lambda n: spectra.pareto_quantiles(2.5, n) ** 0.5),
    "half rank": manufactured(rank(0.5)),
    "rank one": manufactured(rank(0)),
    "orthogonal": manufactured(np.ones),
    "constant": lambda _, rows, columns: np.full((rows, columns), 0.7),
    "zero": lambda _, rows, columns: np.zeros((rows, columns)),
    "integers": lambda rng, rows, columns: rng.integers(-3, 4, size=(rows, columns)),
}


class Probe:
    """A fit that records the table it is given, in absolute units."""

    absolute = True

    def __init__(self, whole_spectrum):
        self.whole_spectrum = whole_spectrum
        self.seen = []

    def __call__(self, log_eigenvalues, valid):
        """Records the table on the host, and fits something."""
        jax.debug.callback(self._record, log_eigenvalues, valid)
        return fit_median()(log_eigenvalues, valid)

    def _record(self, log_eigenvalues, valid):
        self.seen.append((np.asarray(log_eigenvalues), np.asarray(valid)))

    def eigenvalues(self, params, layers):
        """Ascending λ of each layer, in the precision of the table."""
        analysis = tb_optax.layer_analysis(layers, fit=self)(params)
        jax.block_until_ready(analysis)
        jax.effects_barrier()
        logs, valid = self.seen[-1]
        assert not valid[:, 0].all()
        for row, allowed in zip(logs, valid, strict=True):
            assert (np.diff(allowed.astype(int)) >= 0).all()
            assert (row[allowed] < np.inf).all()
        counts = valid.sum(axis=-1)
        np.testing.assert_array_equal(analysis.eigenvalue_count, counts)
        rows = zip(logs, valid, strict=True)
        return analysis.layers, [np.exp(row[allowed]) for row, allowed in rows]


def check_eigenvalues(found, exact, side, eps, *, power):
    """Weyl's bound: |λ̂ - λ| (or |σ̂ - σ|) is at most the norm of a backward error.

    That of a product and of LAPACK's reductions grows like sqrt(n)·eps·norm, with a
    constant below ten.  On top, ln λ is rounded, where λ is far from 1.
    """
    assert found.shape == exact.shape
    assert (np.diff(found) >= 0).all()
    found, exact = found ** (1 / power), exact ** (1 / power)
    largest = exact[-1]
    backward = 8.4 * eps * math.sqrt(side) * largest
    logarithm = 4 * eps * (1 + abs(np.log(np.where(exact > 0, exact, 1)))) * exact
    np.testing.assert_array_less(np.abs(found - exact), backward + logarithm + 1e-45)


@pytest.mark.parametrize(
    ("whole_spectrum", "dtype"),
    [(False, np.float32), (False, np.float64), (True, np.float64)],
    ids=["gram float32", "gram float64", "singular values float64"],
)
@pytest.mark.usefixtures("x64")
def test_eigenvalues_of_every_shape_and_spectrum(whole_spectrum, dtype):
    eps = float(np.finfo(dtype).eps)
    probe = Probe(whole_spectrum)
    for kind in KINDS:
        params = make_params(kind, dtype)
        layers, table = probe.eigenvalues(params, stacks())
        assert len(layers) == len(stacks()) + 2 + 1
        for layer, found in zip(layers, table, strict=True):
            exact = spectra.eigenvalues_of(params[layer.path], layer)
            side = min(layer.matrix_shape(params[layer.path].shape))
            power = 2 if whole_spectrum else 1
            check_eigenvalues(found, exact, side, eps, power=power)


def test_esd_is_the_spectrum_by_singular_values():
    eps = float(np.finfo(np.float32).eps)
    for kind in KINDS:
        params = make_params(kind, np.float32)
        found = esd(params, stacks(), conv_norm=0.25)
        layers = tb_optax.layers.expand_stacks(
            stacks(), {name: kernel.shape for name, kernel in params.items()}
        )
        assert len(found) == len(layers)
        for layer, own in zip(layers, found, strict=True):
            assert isinstance(own, np.ndarray)
            assert own.dtype == np.float32
            exact = spectra.eigenvalues_of(params[layer.path], layer, conv_norm=0.25)
            side = min(layer.matrix_shape(params[layer.path].shape))
            check_eigenvalues(own, exact, side, eps, power=2)


def test_convolution_pools_its_positions():
    """(3, 3, 16, 32) -> 9 matrices of 16 x 32 -> 144 eigenvalues.

    Slices and the flattened kernel are Gaussian of aspects 1/2 and 2/9, and their
    alphas those of two Marchenko-Pastur laws: the convention is part of the method.
    """
    kernel = np.random.default_rng(0).normal(size=(3, 3, 16, 32))
    params = {name: jnp.asarray(kernel, jnp.float32) for name in ("slices", "flat")}
    layers = [
        Layer("slices", CONV),
        Layer("flat", MatrixAxes((0, 1, 2), (3,))),
    ]
    analysis = tb_optax.layer_analysis(layers, min_eigenvalues=32)(params)
    np.testing.assert_array_equal(analysis.eigenvalue_count, [144, 32])
    for alpha, count, aspect in zip(
        analysis.alpha, (144, 32), (1 / 2, 2 / 9), strict=True
    ):
        law = spectra.marchenko_pastur(aspect, count)
        # Matrices of 16 rows: finite-size effects of order 1/16, not rounding.
        assert alpha == pytest.approx(spectra.hill(law, count // 2), rel=1 / 16)
    assert analysis.alpha[1] - analysis.alpha[0] > 0.5


MARCHENKO_PASTUR = {
    1: 2.1217,
    3 / 4: 2.3507,
    1 / 2: 2.7058,
    1 / 3: 3.1175,
    1 / 4: 3.4546,
    1 / 8: 4.470,
    1 / 16: 5.878,
}


def test_gaussian_matrices_have_the_alpha_of_marchenko_and_pastur():
    """Eigenvalues of random matrices are rigid: they stray by a spacing or two.

    The number of them below a point has the variance 2 ln(N)/π² to leading order,
    1.1² at N = 384. The estimate may move as if the tail began five standard
    deviations earlier or later, which is 2 % of alpha here.
    """
    side = 384
    params, expected, tolerance = {}, [], []
    for aspect, published in MARCHENKO_PASTUR.items():
        rng = np.random.default_rng(side)
        rows = round(side / aspect)
        params[f"w{rows}"] = jnp.asarray(rng.normal(size=(rows, side)), jnp.float32)
        fine = spectra.marchenko_pastur(aspect, 20_000)
        limit = spectra.hill(fine, 10_000)
        # Its last digit, and the O(1/N) of a Hill estimate of 20,000 quantiles.
        assert limit == pytest.approx(published, rel=2e-4)
        law = spectra.marchenko_pastur(aspect, side)
        estimates = [spectra.hill(law, side // 2 + shift) for shift in (-5, 0, 5)]
        expected.append(estimates[1])
        tolerance.append(np.ptp(estimates) / 2)
    assert (np.asarray(tolerance) < 0.025 * np.asarray(expected)).all()
    analysis = tb_optax.layer_analysis([Layer(name, DENSE) for name in params])(params)
    error = np.abs(np.asarray(analysis.alpha) - expected)
    np.testing.assert_array_less(error, tolerance)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "v"}, ["layer 'v'", "is not in the parameters", "'w'"]),
        ({"axes": CONV}, ["layer 'w'", "rank 4", "(6, 5)"]),
        ({"part": (1, 3, 9)}, ["layer 'w'", "(1, 3, 9)"]),
    ],
)
def test_esd_refuses_layers_that_do_not_fit(change, words):
    layer = dataclasses.replace(Layer("w", DENSE), **change)
    with pytest.raises(ValueError, match="layer") as error:
        esd({"w": jnp.ones((6, 5))}, [layer])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("conv_norm", [0, -1.0, math.inf, math.nan])
def test_esd_refuses_a_bad_conv_norm(conv_norm):
    with pytest.raises(ValueError, match="conv_norm must be a finite number > 0"):
        esd({"w": jnp.ones((6, 5))}, [Layer("w", DENSE)], conv_norm=conv_norm)
