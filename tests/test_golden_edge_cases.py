"""Degenerate nets: what the published code makes of them, and what the library does.

`data/deviations_edge_cases.json` lists every place where the two disagree, with the
reason. A case is a net, with "/layer" where it has several, and ours is "fitted" or
"not fitted".
"""

import golden
import golden_library
import numpy as np
import pytest
import reference

CONFIGS = golden.read_json("edge_cases")["metric_configs"]
CASES = [
    (row, config, name, net)
    for row, config in enumerate(CONFIGS)
    for name, net in golden.edge_cases().items()
    if net.layer_names
]

every_precision = pytest.mark.parametrize("precision_name", golden.PRECISIONS)


def table_of(name, row, precision_name):
    return golden_library.analyses(precision_name)[row][f"edge/{name}"]


def reference_alpha(eigenvalues, config):
    """The alpha of the formulas in float64, where the peak fit counts no zeros."""
    kept = reference.above_floor(eigenvalues, golden.floor_of(config))
    if config["pl_fitting"] == "median":
        return reference.fit_median(kept, config["xmin_pos"]).alpha
    if config["pl_fitting"] == "goodness-of-fit":
        return reference.fit_min_ks(kept).alpha
    return reference.fit_peak(kept[kept > 0]).alpha


def alpha_tolerance(kernel, config, alpha, ratio, precision_name):
    """The tolerances of `test_golden_metrics`; ratio is λ_max / xmin.

    In 64 bit the nets of low rank are fitted to the rounding of their float32 weights,
    where ratio is up to 1e15: both decompositions carry a noise of eps·sqrt(n)·σ_max.
    """
    side = min(kernel.shape[:2])
    sensitivity = (alpha - 1) ** 2 / alpha * np.sqrt(side)
    if golden_library.is_gram(config):
        noise = float(np.finfo(np.float32).eps) * ratio
        return 1e-10 if precision_name == "x64" else 1e-5 + sensitivity * noise
    noise = float(np.finfo(np.float64).eps) * 2 * np.sqrt(ratio)
    return 1e-10 + 2 * sensitivity * noise if precision_name == "x64" else 1e-4


@every_precision
def test_alpha(precision_name):
    found, failures = {}, []
    for row, config, name, net in CASES:
        table = table_of(name, row, precision_name)
        failed = row in net.info["metric_failures_f64"]
        for i, layer in enumerate(net.own_layers()):
            published = net.arrays["metrics_f64"][row, i, 0]
            place = name if len(net.layer_names) == 1 else f"{name}/{layer}"
            state = golden.state_of(published, failed=failed)
            alpha = float(table["alpha"][i])
            if not table["fitted"][i]:
                found[place, row] = (state, "not fitted")
                assert alpha == 0
                assert not table["tuned"][i]
                continue
            kernel = net.kernel(layer)
            eigenvalues = reference.spectrum(kernel, config["conv_norm"])
            exact = reference_alpha(eigenvalues, config)
            ratio = eigenvalues[-1] / float(table["xmin"][i])
            tolerance = alpha_tolerance(kernel, config, exact, ratio, precision_name)
            deviation = abs(alpha / exact - 1)
            failures += golden.beyond("alpha", f"{place}, {row}", deviation, tolerance)
            # The recorded float64 runs hold some temporaries in float32.
            tolerance = max(tolerance, 1e-6)
            if state != "finite" or abs(alpha - published) > tolerance * published:
                found[place, row] = (state, "fitted")
    assert not failures, "\n".join(failures[:20])
    table = golden.deviations("edge_cases")
    golden.assert_as_listed(table, "alpha", precision_name, found)


@every_precision
def test_norms_and_counts(precision_name):
    tolerance = 1e-10 if precision_name == "x64" else 1e-5
    failures = []
    for row, _, name, net in CASES:
        table = table_of(name, row, precision_name)
        for i, layer in enumerate(net.own_layers()):
            shape = net.kernel(layer).shape
            count = min(shape[:2]) * np.prod(shape[2:], dtype=int)
            assert table["eigenvalue_count"][i] == count
            recorded = net.arrays["metrics_f64"][row, i, 3:5]
            ours = np.asarray(
                [table["spectral_norm"][i], table["frobenius_norm"][i]], np.float64
            )
            # Nothing that is not finite leaves the analysis.
            assert np.isfinite(ours).all()
            if np.isfinite(recorded).all():
                deviation = np.abs(ours / np.sqrt(recorded) - 1)
                failures += golden.beyond(
                    "norms", f"{name}/{layer}", deviation, tolerance
                )
    assert not failures, "\n".join(failures[:20])
