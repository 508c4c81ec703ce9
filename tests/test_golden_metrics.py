"""Spectra, fits and metrics of all recorded nets, against the published code.

Every layer of every net under all 20 configurations, and of two trained ResNets under
every fit, in float32 and in 64 bit, against the numbers that the published code gives
in float64.
"""

from typing import NamedTuple

import golden
import golden_library
import golden_record
import numpy as np
import pytest
from golden_fits import CLOSE_FITS, EPS, NOT_FITTED, TIE, best_fit, tied_alphas
from golden_library import is_gram

import tb_optax

RECORD = golden_record.Record("metrics of the nets")
every_precision = pytest.mark.parametrize("precision_name", golden.PRECISIONS)
EXACT = {"float32": 1e-5, "x64": 1e-10}


class Case(NamedTuple):
    """One net under one configuration.

    Attributes:
        net: the recorded net.
        row: position of the configuration.
        config: the configuration.
        table: what the library says.
        recorded: what the published code says, (layers, columns).
        precision_name: one of `golden.PRECISIONS`.
    """

    net: golden.Net
    row: int
    config: dict
    table: tb_optax.Analysis
    recorded: np.ndarray
    precision_name: str

    @property
    def kind(self):
        """The fit."""
        floor = ", floor" if self.config["filter_zeros"] else ""
        return self.config["pl_fitting"] + floor

    @property
    def noisy(self):
        """Whether xmin may be rounding noise: of a Gram matrix in float32."""
        return self.precision_name == "float32" and is_gram(self.config)

    @property
    def tails(self):
        """The float64 fits of all layers."""
        return [best_fit(self.net.name, n, self.row) for n in self.net.layer_names]

    def noise(self, eps=EPS):
        """Relative rounding noise of xmin, per layer, by the route of the fit.

        λ carries eps·sqrt(n)·λ_max from a Gram matrix, and σ carries eps·sqrt(n)·σ_max
        from a singular value decomposition.
        """
        kernels = [self.net.kernel(layer) for layer in self.net.layer_names]
        side = np.asarray([min(kernel.shape[:2]) for kernel in kernels])
        ratio = self.recorded[:, 3] / np.asarray([tail.xmin for tail in self.tails])
        ratio = ratio if is_gram(self.config) else 2 * np.sqrt(ratio)
        return eps * np.sqrt(side) * ratio

    def compare(self, what, deviation, tolerance, rows=slice(None)):
        """Asserts what some of the layers deviate by."""
        options = f"{self.kind} {self.config['xmin_pos']} {self.config['conv_norm']}"
        where = [f"{self.net.name} {name}, {options}" for name in self.net.layer_names]
        tolerance = np.broadcast_to(tolerance, deviation.shape)[rows]
        places = np.asarray(where)[rows].tolist()
        RECORD.compare(what, self.precision_name, deviation[rows], tolerance, places)


def cases(precision_name):
    tables = golden_library.analyses(precision_name)
    for name in golden.NETS + golden.TRAINED:
        net = golden.net(name)
        for row, config in enumerate(golden.metric_configs(name)):
            table = tables[golden.metric_row(config)][name]
            recorded = net.arrays["metrics_f64d"][row]
            yield Case(net, row, config, table, recorded, precision_name)


@every_precision
def test_alpha(precision_name):
    excused = set()
    for case in cases(precision_name):
        alpha, published = case.table.alpha.astype(np.float64), case.recorded[:, 0]
        tolerance = np.full(alpha.shape, 1e-10 if precision_name == "x64" else 1e-4)
        if case.noisy:
            tolerance = 1e-5 + (published - 1) ** 2 / published * case.noise()
        deviation = np.abs(alpha / published - 1)
        if case.config["pl_fitting"] != "median":
            for i in np.flatnonzero(case.table.fitted & (deviation > tolerance)):
                close = case.net.name, case.net.layer_names[i]
                others = tied_alphas(*close, case.row, precision_name)
                deviation[i] = np.abs(alpha[i] / others - 1).min()
                excused.add((*close, case.config["pl_fitting"]))
                RECORD.excuse("tie of two tails", precision_name)
        case.compare(f"alpha, {case.kind}", deviation, tolerance, case.table.fitted)
    assert excused <= CLOSE_FITS[precision_name]


@every_precision
def test_close_fits_are_those_named(precision_name):
    close = {
        (name, layer, config["pl_fitting"])
        for name in golden.NETS + golden.TRAINED
        for row, config in enumerate(golden.metric_configs(name))
        if config["pl_fitting"] != "median"
        for layer in golden.net(name).layer_names
        if len(tied_alphas(name, layer, row, precision_name)) > 1
    }
    assert close == CLOSE_FITS[precision_name]


@every_precision
def test_only_rounding_noise_is_not_fitted(precision_name):
    for case in cases(precision_name):
        net, position, table = case.net, case.config["xmin_pos"], case.table
        missing = np.flatnonzero(~table.fitted)
        expected = [
            layer
            for layer in net.layer_names
            if case.noisy and position in NOT_FITTED.get((net.name, layer), ())
        ]
        assert [net.layer_names[i] for i in missing] == expected, (net.name, position)
        for i in missing:
            # The library sees xmin through the noise itself, hence the factor.
            assert case.recorded[i, 3] / case.tails[i].xmin > 0.5 / (8 * EPS)
            RECORD.excuse("xmin in the rounding noise, not fitted", precision_name)
        for column in ("alpha", "alpha_hat", "ks_distance", "xmin", "tail_size"):
            assert not np.any(getattr(table, column)[missing])
        assert np.all(table.multipliers[missing] == 1)
        assert not np.any(table.tuned[missing])


@every_precision
def test_norms_and_counts(precision_name):
    tolerance = EXACT[precision_name]
    for case in cases(precision_name):
        recorded = case.recorded
        for what, expected, allowed in (
            ("spectral_norm", np.sqrt(recorded[:, 3]), tolerance),
            ("frobenius_norm", np.sqrt(recorded[:, 4]), tolerance),
            # The square of a quotient of the two.
            ("stable_rank", recorded[:, 4] / recorded[:, 3], 4 * tolerance),
        ):
            deviation = np.abs(getattr(case.table, what) / expected - 1)
            case.compare(what, deviation, allowed)
        assert np.array_equal(case.table.eigenvalue_count, recorded[:, 5])


@every_precision
def test_distance_tail_and_alpha_hat(precision_name):
    """The other columns, held to what the errors of alpha and xmin allow.

    With a relative error r of xmin and (alpha - 1)²·r of alpha, and
    |∂D/∂ln xmin| <= alpha - 1, |∂D/∂alpha| <= 1 / (e·(alpha - 1)),
    the distance is off by at most (1 + 1/e)·(alpha - 1)·r.
    """
    for case in cases(precision_name):
        table, (published, hat, distance) = case.table, case.recorded[:, :3].T
        xmin = np.asarray([tail.xmin for tail in case.tails])
        size = np.asarray([tail.tail_size for tail in case.tails])
        if precision_name == "x64":
            in_hat, in_distance = 1e-10 * published, 1e-10
            in_xmin = 1e-10 + case.noise(np.finfo(np.float64).eps)
        else:
            share = case.noise() if case.noisy else np.zeros(len(xmin))
            in_alpha = 1e-4
            if case.noisy:
                in_alpha = 1e-5 + (published - 1) ** 2 / published * share
            # alpha·log10 λ_max, with λ_max to 2e-5.
            in_hat = in_alpha * np.abs(hat) + published * 2e-5 / np.log(10)
            in_distance = TIE["float32"] + 1.4 * (published - 1) * share
            in_xmin = 2e-5 + case.noise()
        for what, deviation, tolerance in (
            ("alpha_hat", np.abs(table.alpha_hat - hat), in_hat),
            ("ks_distance", np.abs(table.ks_distance - distance), in_distance),
            ("xmin", np.abs(table.xmin / xmin - 1), in_xmin),
        ):
            case.compare(f"{what}, {case.kind}", deviation, tolerance, table.fitted)
        assert np.array_equal(table.tail_size[table.fitted], size[table.fitted])


@every_precision
def test_esd(precision_name):
    """All eigenvalues of one net, to rounding of the largest."""
    net = golden.net("resnet18_w0.125_heavy")
    eps = float(np.finfo(golden.DTYPES[precision_name]).eps)
    with golden_library.precision(precision_name):
        found = tb_optax.esd(net.tree(precision_name), net.layers())
    for layer, actual, recorded in zip(
        net.layer_names, found, golden.eigenvalues_of(net), strict=True
    ):
        # σ carries an error of a few eps·σ_max, so that λ carries 2·σ·σ_max of it.
        scale = np.sqrt(recorded * recorded[-1])
        tolerance = 2 * 8 * eps * scale + (8 * eps) ** 2 * recorded[-1]
        deviation, where = np.abs(actual - recorded), f"{net.name} {layer}"
        RECORD.compare("esd", precision_name, deviation, tolerance, where)
