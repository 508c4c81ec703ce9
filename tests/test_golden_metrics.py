"""Spectra, fits and metrics of all recorded nets, against the published code.

Every layer of every net under all 20 configurations, in float32 and in 64 bit,
against the numbers that the published code gives in float64.
"""

from typing import NamedTuple

import golden
import golden_library
import golden_record
import numpy as np
import pytest
from golden_fits import (
    CLOSE_FITS,
    CONFIGS,
    EPS,
    NOT_FITTED,
    TIE,
    best_fit,
    tied_alphas,
)
from golden_library import is_gram

import tb_optax

RECORD = golden_record.Record()


@pytest.fixture(scope="module", autouse=True)
def print_table():
    yield
    print(RECORD.table("metrics of the nets"))


def kind_of(config):
    floor = ", floor" if config["filter_zeros"] else ""
    return config["pl_fitting"] + floor


def noise(case, eps=EPS):
    """Relative rounding noise of xmin, per layer, by the route of the fit.

    λ carries eps·sqrt(n)·λ_max from a Gram matrix, and σ carries eps·sqrt(n)·σ_max
    from a singular value decomposition.
    """
    kernels = [case.net.kernel(layer) for layer in case.net.layer_names]
    side = np.asarray([min(kernel.shape[:2]) for kernel in kernels])
    ratio = case.recorded[:, 3] / np.asarray([tail.xmin for tail in case.tails])
    ratio = ratio if is_gram(case.config) else 2 * np.sqrt(ratio)
    return eps * np.sqrt(side) * ratio


class Case(NamedTuple):
    """One net under one configuration.

    Attributes:
        net: the recorded net.
        row: position of the configuration.
        config: the configuration.
        table: what the library says.
        recorded: what the published code says, (layers, columns).
    """

    net: golden.Net
    row: int
    config: dict
    table: golden_library.Table
    recorded: np.ndarray

    @property
    def tails(self):
        """The float64 fits of all layers."""
        return [best_fit(self.net.name, n, self.row) for n in self.net.layer_names]


def cases(precision_name):
    for row, config in enumerate(CONFIGS):
        tables = golden_library.analyses(precision_name)[row]
        for name in golden.NETS:
            net = golden.net(name)
            recorded = net.arrays["metrics_f64d"][row]
            yield Case(net, row, config, tables[name], recorded)


def compare(what, precision_name, case, rows, deviation, tolerance):
    """Notes the deviations of some layers of a case; what is beyond tolerance."""
    config = case.config
    fit = f"{kind_of(config)} {config['xmin_pos']} {config['conv_norm']}"
    where = [f"{case.net.name} {case.net.layer_names[i]}, {fit}" for i in rows]
    tolerance = np.broadcast_to(tolerance, deviation.shape)[rows]
    return RECORD.compare(what, precision_name, deviation[rows], tolerance, where)


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
def test_alpha(precision_name):
    failures, excused = [], set()
    RECORD.excuse("tie of two tails", precision_name, 0)
    for case in cases(precision_name):
        net, config = case.net, case.config
        alpha, published = case.table["alpha"].astype(np.float64), case.recorded[:, 0]
        tolerance = np.full(alpha.shape, 1e-10 if precision_name == "x64" else 1e-4)
        if precision_name == "float32" and is_gram(config):
            tolerance = 1e-5 + (published - 1) ** 2 / published * noise(case)
        deviation = np.abs(alpha / published - 1)
        fitted = case.table["fitted"]
        for i in np.flatnonzero(fitted & (deviation > tolerance)):
            if config["pl_fitting"] == "median":
                continue
            close = (net.name, net.layer_names[i], config["pl_fitting"])
            others = tied_alphas(*close[:2], case.row, precision_name)
            nearest = np.abs(alpha[i] / others - 1).min()
            if nearest <= tolerance[i]:
                excused.add(close)
                RECORD.excuse("tie of two tails", precision_name)
                deviation[i] = nearest
        rows = np.flatnonzero(fitted)
        what = f"alpha, {kind_of(config)}"
        failures += compare(what, precision_name, case, rows, deviation, tolerance)
    assert not failures, "\n".join(failures[:20])
    assert excused <= CLOSE_FITS[precision_name]


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
def test_close_fits_are_those_named(precision_name):
    close = {
        (name, layer, config["pl_fitting"])
        for row, config in enumerate(CONFIGS)
        if config["pl_fitting"] != "median"
        for name in golden.NETS
        for layer in golden.net(name).layer_names
        if len(tied_alphas(name, layer, row, precision_name)) > 1
    }
    assert close == CLOSE_FITS[precision_name]


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
def test_only_rounding_noise_is_not_fitted(precision_name):
    for case in cases(precision_name):
        net, config, table = case.net, case.config, case.table
        missing = np.flatnonzero(~table["fitted"])
        expected = []
        if precision_name == "float32" and is_gram(config):
            expected = [
                layer
                for layer in net.layer_names
                if config["xmin_pos"] in NOT_FITTED.get((net.name, layer), ())
            ]
        assert [net.layer_names[i] for i in missing] == expected, (net.name, config)
        for i in missing:
            # The library sees xmin through the noise itself, hence the factor.
            assert case.recorded[i, 3] / case.tails[i].xmin > 0.5 / (8 * EPS)
            RECORD.excuse("xmin in the rounding noise, not fitted", precision_name)
        for column in ("alpha", "alpha_hat", "ks_distance", "xmin", "tail_size"):
            assert not np.any(table[column][missing])
        assert np.all(table["multipliers"][missing] == 1)
        assert not np.any(table["tuned"][missing])


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
def test_norms_and_counts(precision_name):
    failures = []
    tolerance = 1e-10 if precision_name == "x64" else 1e-5
    for case in cases(precision_name):
        table, recorded = case.table, case.recorded
        every = np.arange(len(recorded))
        stable_rank = recorded[:, 4] / recorded[:, 3]
        for what, expected, allowed in (
            ("spectral_norm", np.sqrt(recorded[:, 3]), tolerance),
            ("frobenius_norm", np.sqrt(recorded[:, 4]), tolerance),
            # The square of a quotient of the two.
            ("stable_rank", stable_rank, 4 * tolerance),
        ):
            deviation = np.abs(table[what] / expected - 1)
            failures += compare(what, precision_name, case, every, deviation, allowed)
        assert np.array_equal(table["eigenvalue_count"], recorded[:, 5])
    assert not failures, "\n".join(failures[:20])


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
def test_distance_tail_and_alpha_hat(precision_name):
    """The other columns, held to what the errors of alpha and xmin allow.

    With a relative error r of xmin and (alpha - 1)²·r of alpha, and
    |∂D/∂ln xmin| <= alpha - 1, |∂D/∂alpha| <= 1 / (e·(alpha - 1)),
    the distance is off by at most (1 + 1/e)·(alpha - 1)·r.
    """
    failures = []
    for case in cases(precision_name):
        table, recorded = case.table, case.recorded
        published, hat = recorded[:, 0], recorded[:, 1]
        xmin = np.asarray([tail.xmin for tail in case.tails])
        size = np.asarray([tail.tail_size for tail in case.tails])
        fitted = np.flatnonzero(table["fitted"])
        if precision_name == "x64":
            in_hat, in_distance = 1e-10 * published, 1e-10
            in_xmin = 1e-10 + noise(case, np.finfo(np.float64).eps)
        else:
            gram = is_gram(case.config)
            share = noise(case) if gram else np.zeros(len(xmin))
            in_alpha = 1e-5 + (published - 1) ** 2 / published * share if gram else 1e-4
            # alpha·log10 λ_max, with λ_max to 2e-5.
            in_hat = in_alpha * np.abs(hat) + published * 2e-5 / np.log(10)
            in_distance = TIE["float32"] + 1.4 * (published - 1) * share
            in_xmin = 2e-5 + noise(case)
        for what, deviation, tolerance in (
            ("alpha_hat", np.abs(table["alpha_hat"] - hat), in_hat),
            ("ks_distance", np.abs(table["ks_distance"] - recorded[:, 2]), in_distance),
            ("xmin", np.abs(table["xmin"] / xmin - 1), in_xmin),
        ):
            what = f"{what}, {kind_of(case.config)}"
            failures += compare(
                what, precision_name, case, fitted, deviation, tolerance
            )
        assert np.array_equal(table["tail_size"][fitted], size[fitted]), case.net.name
    assert not failures, "\n".join(failures[:20])


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
def test_esd(precision_name):
    """All eigenvalues of one net, to rounding of the largest."""
    net = golden.net("resnet18_w0.125_heavy")
    eps = float(np.finfo(golden_library.dtype_of(precision_name)).eps)
    with golden_library.precision(precision_name):
        found = tb_optax.esd(net.tree(precision_name), net.layers())
    for layer, actual, recorded in zip(
        net.layer_names, found, golden.eigenvalues_of(net), strict=True
    ):
        # σ carries an error of a few eps·σ_max, so that λ carries 2·σ·σ_max of it.
        scale = np.sqrt(recorded * recorded[-1])
        tolerance = 2 * 8 * eps * scale + (8 * eps) ** 2 * recorded[-1]
        where = [f"{net.name} {layer}"] * len(recorded)
        deviation = np.abs(actual - recorded)
        assert not RECORD.compare("esd", precision_name, deviation, tolerance, where)
