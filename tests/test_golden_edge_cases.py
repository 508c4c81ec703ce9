"""Degenerate nets: what the published code does there, and what the library does.

`data/deviations_edge_cases.json` lists every place where the two disagree, with the
reason. For "alpha", a case is a net, with "/layer" where it has several, and ours is
"fitted" or "not fitted". For "rate", a case is a net, and ours is "untouched" (every
multiplier is 1) or "others" (the remaining layers are balanced among themselves).
"""

import itertools
from typing import Any

import golden
import golden_library
import golden_record
import numpy as np
import pytest
import reference
from golden_deviations import assert_as_listed, listed_in, state_of, where

import tb_optax

RECORD = golden_record.Record("degenerate nets")
EDGE = golden.read_json("edge_cases")
METRIC_CONFIGS, RATE_CONFIGS = EDGE["metric_configs"], EDGE["lr_configs"]
DEVIATIONS = listed_in("deviations_edge_cases")
every_precision = pytest.mark.parametrize("precision_name", golden.PRECISIONS)
MAPS = ("tb_linear_map", "tb_sqrt", "tb_log2", "tb_step")
# Without the row of a map that does not exist, which a function cannot be.
RATES = frozenset().union(*(where(RATE_CONFIGS, assign_func=name) for name in MAPS))
CASES = golden.edge_cases()
WITH_LAYERS = {name: net for name, net in CASES.items() if net.layer_names}


def reference_alpha(eigenvalues, config, precision_name):
    """The alpha of the formulas in float64, where the peak fit counts no zeros.

    In float32 these are all that rounding hides in products in float64.
    """
    kept = reference.above_floor(eigenvalues, golden.floor_of(config))
    if config["pl_fitting"] == "fix-finger":
        hidden = 0 if precision_name == "x64" else 1e-14 * eigenvalues[-1]
        kept = kept[kept > hidden]
    return reference.FITS[config["pl_fitting"]](kept, config["xmin_pos"]).alpha


def alpha_tolerance(kernel, config, alpha, ratio, precision_name):
    """The tolerances of `test_golden_metrics`; ratio is λ_max / xmin.

    In 64 bit the nets of low rank are fitted to the rounding of their float32 weights,
    where ratio is up to 1e15: both decompositions carry a noise of eps·sqrt(n)·σ_max.
    """
    side = min(kernel.shape[:2])
    sensitivity = (alpha - 1) ** 2 / alpha * np.sqrt(side)
    if config["pl_fitting"] == "median" and not config["filter_zeros"]:
        noise = float(np.finfo(np.float32).eps) * ratio
        return 1e-10 if precision_name == "x64" else 1e-5 + sensitivity * noise
    noise = float(np.finfo(np.float64).eps) * 2 * np.sqrt(ratio)
    return 1e-10 + 2 * sensitivity * noise if precision_name == "x64" else 1e-4


def tables(precision_name):
    """Row and configuration, name, net and table of every analysis."""
    for row, config in enumerate(METRIC_CONFIGS):
        for name, net in WITH_LAYERS.items():
            table = golden_library.analyses(precision_name)[row][f"edge/{name}"]
            yield row, config, name, net, table


@every_precision
def test_alpha(precision_name):
    found = {}
    for row, config, name, net, table in tables(precision_name):
        for i, layer in enumerate(golden.own_layers(net)):
            published = net.arrays["metrics_f64"][row, i, 0]
            place = name if len(net.layer_names) == 1 else f"{name}/{layer}"
            failed = row in net.info["metric_failures_f64"]
            state = state_of(published, failed=failed)
            if not table.fitted[i]:
                found[place, row] = (state, "not fitted")
                assert table.alpha[i] == 0
                assert not table.tuned[i]
                continue
            alpha = float(table.alpha[i])
            kernel = net.kernel(layer)
            eigenvalues = reference.spectrum(kernel, config["conv_norm"])
            exact = reference_alpha(eigenvalues, config, precision_name)
            ratio = eigenvalues[-1] / float(table.xmin[i])
            tolerance = alpha_tolerance(kernel, config, exact, ratio, precision_name)
            deviation, where = abs(alpha / exact - 1), f"{place}, configuration {row}"
            what = "alpha, to the formulas"
            RECORD.compare(what, precision_name, deviation, tolerance, where)
            # The recorded float64 runs hold some temporaries in float32.
            tolerance = max(tolerance, 1e-6)
            if state != "finite" or abs(alpha - published) > tolerance * published:
                found[place, row] = (state, "fitted")
    assert_as_listed(DEVIATIONS, "alpha", precision_name, found, RECORD)


@every_precision
def test_norms_and_counts(precision_name):
    tolerance = 1e-10 if precision_name == "x64" else 1e-5
    for row, config, name, net, table in tables(precision_name):
        for i, layer in enumerate(golden.own_layers(net)):
            *sides, height, width = (*net.kernel(layer).shape, 1, 1)[:4]
            assert table.eigenvalue_count[i] == min(sides) * height * width
            recorded = net.arrays["metrics_f64"][row, i, 3:5]
            ours = np.asarray([table.spectral_norm[i], table.frobenius_norm[i]], float)
            # Nothing that is not finite leaves the analysis.
            assert np.isfinite(ours).all()
            if np.isfinite(recorded).all():
                deviation = np.abs(ours / np.sqrt(recorded) - 1)
                where = f"{name}/{layer}, conv_norm {config['conv_norm']}"
                RECORD.compare("norms", precision_name, deviation, tolerance, where)


@every_precision
def test_rates(precision_name):
    found, owners = {}, {}
    tolerance = 1e-12 if precision_name == "x64" else 1e-5
    for (name, net), row in itertools.product(WITH_LAYERS.items(), sorted(RATES)):
        config, names = RATE_CONFIGS[row], golden.own_layers(net)
        layers, kept = golden_library.selected_layers(net, config, names)
        rates = np.ones(len(net.param_names))
        if layers:
            place = name, golden_library.structure_of(config)
            if place not in owners:
                owners[place] = golden_library.leaf_owners([layers], net)[0]
            table = golden_library.tables_of(config, precision_name)[f"edge/{name}"]
            analysis = golden_library.rows_of(table, layers, kept)
            with golden_library.precision(precision_name):
                multipliers, tuned = golden_library.balance(analysis, config)
            rates = golden_library.leaf_values(multipliers, owners[place])
            scores = golden_library.scores_of(analysis, config)
            expected = golden_library.expected_multipliers(scores, tuned, config)
            expected = golden_library.expected_leaf_values(layers, expected, net)
            deviation, where = np.abs(rates - expected), f"{name}, configuration {row}"
            what = "rates, to the formulas"
            RECORD.compare(what, precision_name, deviation, tolerance, where)
        published = net.arrays["lr_f32"][row] / EDGE["untuned_lr"]
        state = state_of(published, failed=row in net.info["lr_failures"])
        if state != "finite" or np.abs(rates - published).max() >= 1e-3:
            found[name, row] = (state, "untouched" if np.all(rates == 1) else "others")
    assert_as_listed(DEVIATIONS, "rate", precision_name, found, RECORD)


def test_a_net_without_layers_is_an_error():
    """Published: nothing is tuned, or another error, by the map and the removals."""
    net = CASES["no_layers"]
    assert len(net.info["lr_failures"]) < len(RATE_CONFIGS)
    with pytest.raises(ValueError, match="no layer to balance"):
        tb_optax.layer_analysis([])(net.tree("float32"))


def test_a_map_is_a_function():
    """The last configuration names a map that does not exist: both refuse it."""
    nonsense: Any = "nonsense"
    assert RATE_CONFIGS[30]["assign_func"] == "nonsense"
    assert all(30 in net.info["lr_failures"] for net in CASES.values())
    # A TypeError where the types of arguments are checked, as in these tests.
    with pytest.raises((ValueError, TypeError), match="assign"):
        tb_optax.layer_analysis(assign=nonsense)
