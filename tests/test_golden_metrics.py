"""Spectra, fits and metrics of all recorded nets, against the published code.

Every layer of every net under all 20 configurations, of the trained ResNets under
three, in float32 and in 64 bit, against the numbers that the published code gives in
float64. `analyses` holds them all, the degenerate nets among them.
"""

import golden
import golden_fits
import golden_library
import numpy as np
import pytest
from golden_fits import CLOSE_FITS, CONFIGS, NOT_FITTED
from golden_library import is_gram

CHECKPOINTS = [f"checkpoint/{name}" for name in golden.CHECKPOINTS]
# Every net under every configuration that is recorded.
CASES = [(name, row) for row in range(len(CONFIGS)) for name in golden.NETS]
CASES += [(name, r) for name in CHECKPOINTS for r in golden.CHECKPOINT_ROWS.values()]

every_precision = pytest.mark.parametrize("precision_name", golden.PRECISIONS)


def eps_of(precision_name):
    return float(np.finfo(golden_library.dtype_of(precision_name)).eps)


def where(name, row):
    return f"{name}, {CONFIGS[row]}"


def tolerances(net, row, precision_name, recorded, xmin):
    """Tolerance of each column, per layer, by the route of the fit.

    λ carries a noise of eps·sqrt(n)·λ_max from a Gram matrix, and σ one of
    eps·sqrt(n)·σ_max from a singular value decomposition. With a relative error r of
    xmin, alpha is off by (alpha - 1)²·r, and since |∂D/∂ln xmin| <= alpha - 1 and
    |∂D/∂alpha| <= 1 / (e·(alpha - 1)), D by at most (1 + 1/e)·(alpha - 1)·r.
    """
    alpha, hat, top = recorded[:, 0], recorded[:, 1], recorded[:, 3]
    side = np.asarray([min(net.kernel(name).shape[:2]) for name in net.layer_names])
    gram = is_gram(CONFIGS[row])
    ratio = top / xmin if gram else 2 * np.sqrt(top / xmin)
    noise = eps_of(precision_name) * np.sqrt(side) * ratio
    if precision_name == "x64":
        return {
            "alpha": 1e-10 * alpha,
            "alpha_hat": 1e-10 * alpha,
            "ks_distance": 1e-10,
            "xmin": (1e-10 + noise) * xmin,
        }
    share = noise if gram else 0 * noise
    relative = 1e-5 + (alpha - 1) ** 2 / alpha * share if gram else 1e-4
    return {
        "alpha": relative * alpha,
        # alpha·log10 λ_max, with λ_max to 2e-5.
        "alpha_hat": relative * np.abs(hat) + alpha * 2e-5 / np.log(10),
        "ks_distance": 2e-5 + 1.4 * (alpha - 1) * share,
        "xmin": (2e-5 + noise) * xmin,
    }


@every_precision
def test_fits(precision_name):
    failures = []
    for name, row in CASES:
        net = golden.net(name)
        table = golden_library.analyses(precision_name)[row][name]
        recorded = net.arrays["metrics_f64d"][row].copy()
        best = [golden_fits.fit(name, layer, row) for layer in net.layer_names]
        tails = [
            golden_fits.fit_with_tail(name, layer, row, precision_name, int(size))
            for layer, size in zip(net.layer_names, table["tail_size"], strict=True)
        ]
        for i, (tail, own) in enumerate(zip(tails, best, strict=True)):
            if tail != own:
                hat = tail.alpha * np.log10(recorded[i, 3])
                recorded[i, :3] = tail.alpha, hat, tail.ks_distance
        xmin = np.asarray([tail.xmin for tail in tails])
        allowed = tolerances(net, row, precision_name, recorded, xmin)
        fitted = table["fitted"]
        for what, expected in (
            ("alpha", recorded[:, 0]),
            ("alpha_hat", recorded[:, 1]),
            ("ks_distance", recorded[:, 2]),
            ("xmin", xmin),
        ):
            deviation = np.abs(table[what] - expected)[fitted]
            tolerance = np.broadcast_to(allowed[what], expected.shape)[fitted]
            failures += golden.beyond(what, where(name, row), deviation, tolerance)
        sizes = np.asarray([tail.tail_size for tail in tails])
        assert np.array_equal(table["tail_size"][fitted], sizes[fitted]), name
    assert not failures, "\n".join(failures[:20])


@every_precision
def test_close_fits_are_those_named(precision_name):
    close = {
        (name, layer, CONFIGS[row]["pl_fitting"])
        for name, row in CASES
        if CONFIGS[row]["pl_fitting"] != "median"
        for layer in golden.net(name).layer_names
        if len(golden_fits.ties(name, layer, row, precision_name)) > 1
    }
    assert close == CLOSE_FITS[precision_name]


@every_precision
def test_only_rounding_noise_is_not_fitted(precision_name):
    for name, row in CASES:
        net, config = golden.net(name), CONFIGS[row]
        table = golden_library.analyses(precision_name)[row][name]
        missing = np.flatnonzero(~table["fitted"])
        expected = []
        if precision_name == "float32" and is_gram(config):
            expected = [
                layer
                for layer in net.layer_names
                if config["xmin_pos"] in NOT_FITTED.get((name, layer), ())
            ]
        assert [net.layer_names[i] for i in missing] == expected, where(name, row)
        for i in missing:
            # The library sees xmin through the noise itself, hence the factor.
            xmin = golden_fits.fit(name, net.layer_names[i], row).xmin
            top = net.arrays["metrics_f64d"][row, i, 3]
            assert top / xmin > 0.5 / (8 * eps_of("float32"))
        for column in ("alpha", "alpha_hat", "ks_distance", "xmin", "tail_size"):
            assert not np.any(table[column][missing])
        assert np.all(table["multipliers"][missing] == 1)
        assert not np.any(table["tuned"][missing])


@every_precision
def test_norms_and_counts(precision_name):
    failures = []
    tolerance = 1e-10 if precision_name == "x64" else 1e-5
    for name, row in CASES:
        table = golden_library.analyses(precision_name)[row][name]
        recorded = golden.net(name).arrays["metrics_f64d"][row]
        top, total, count = recorded[:, 3:].T
        for what, expected, allowed in (
            ("spectral_norm", np.sqrt(top), tolerance),
            ("frobenius_norm", np.sqrt(total), tolerance),
            # The square of a quotient of the two.
            ("stable_rank", total / top, 4 * tolerance),
        ):
            deviation = np.abs(table[what] / expected - 1)
            failures += golden.beyond(what, where(name, row), deviation, allowed)
        assert np.array_equal(table["eigenvalue_count"], count)
    assert not failures, "\n".join(failures[:20])
