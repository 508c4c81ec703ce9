"""Learning rates of all parameters of all nets, under all recorded configurations.

224 configurations for each of 14 nets would be thousands of compilations.  They share
the analyses of `test_golden_metrics`: for each configuration the rows of its layers
make a table, the library's map gives the multipliers, and the library's
`leaf_multipliers` carries them to the parameters.  What lies between table and map is
compared with whole analyses in `test_whole_analysis`.
"""

import functools
import itertools

import golden
import golden_fits
import golden_library
import golden_record
import numpy as np
import pytest
from golden_deviations import (
    Deviation,
    assert_as_listed,
    listed_in,
    state_of,
    where,
)

import tb_optax

RECORD = golden_record.Record()
SHARED = golden.shared()
CONFIGS = SHARED["lr_configs"]
COLUMNS = SHARED["metric_columns"]

NOISE = "xmin is rounding noise of float32 Gram matrices: its layer is left alone"

# "untouched": every multiplier is 1; "others": the remaining layers are balanced among
# themselves.
DEVIATIONS = listed_in("deviations_rates")


@pytest.fixture(scope="module", autouse=True)
def print_table():
    yield
    print(RECORD.table("learning rates of the nets"))


@functools.cache
def noise_deviations():
    """Rows with a layer that float32 cannot fit among those to be tuned."""
    result = []
    for name in sorted({name for name, _ in golden_fits.NOT_FITTED}):
        net = golden.net(name)
        listed = {
            row
            for deviation in DEVIATIONS
            if name in deviation.cases
            for row in deviation.configs
        }
        rows = set()
        for row, config in enumerate(CONFIGS):
            if not golden_library.is_gram(config):
                continue
            _, kept = golden_library.selected_layers(net, config)
            counts = net.arrays["metrics_f64d"][0, kept, COLUMNS.index("eigs_num")]
            rows |= {
                row
                for layer, count in zip(net.layer_names[kept], counts, strict=True)
                if config["xmin_pos"] in golden_fits.NOT_FITTED.get((name, layer), ())
                and count >= config["eigs_thresh"]
                and row not in listed
            }
        same = where(CONFIGS, lr_min_ratio=1.0, lr_max_ratio=1.0)
        rows = frozenset(rows - same)
        result.append(
            Deviation("rate", (name,), rows, "finite", "others", NOISE, ("float32",))
        )
    return tuple(result)


def published_scores(net, config, fitted, table, precision_name):
    """The recorded float64 scores, of a tied tail where float32 chose another."""
    row = golden.metric_row(config)
    column = COLUMNS.index(config["esd_metric_for_tb"])
    scores = net.arrays["metrics_f64d"][row, :, column].copy()
    if config["pl_fitting"] != "median":
        assert config["esd_metric_for_tb"] == "alpha"
        for i in np.flatnonzero(fitted):
            alpha = float(table["alpha"][i])
            name = net.layer_names[i]
            scores[i] = golden_fits.accepted_alpha(
                net.name, name, row, precision_name, alpha
            )
    return scores


@functools.cache
def rates(name, precision_name):
    """The library's and the expected multipliers, (configurations, parameters)."""
    net = golden.net(name)
    ours = np.empty((len(CONFIGS), len(net.param_names)))
    expected = np.empty_like(ours)
    order = sorted(range(len(CONFIGS)), key=structure)
    groups = [list(rows) for _, rows in itertools.groupby(order, key=structure)]
    chosen = [golden_library.selected_layers(net, CONFIGS[rows[0]]) for rows in groups]
    owners = golden_library.leaf_owners([layers for layers, _ in chosen], net)
    for rows, own, (layers, kept) in zip(groups, owners, chosen, strict=True):
        by_layer, by_formula = [], []
        for row in rows:
            config = CONFIGS[row]
            table = golden_library.tables_of(config, precision_name)[name]
            analysis = table.analysis(layers, kept)
            fitted = table["fitted"]
            scores = published_scores(net, config, fitted, table, precision_name)[kept]
            enough = table["eigenvalue_count"] >= config["eigs_thresh"]
            with golden_library.precision(precision_name):
                by_layer.append(golden_library.balance(analysis, config)[0])
            by_formula.append(
                golden_library.expected_multipliers(
                    scores, (fitted & enough)[kept], config
                )
            )
        ours[rows] = golden_library.leaf_values(np.stack(by_layer), own)
        expected[rows] = golden_library.expected_leaf_values(
            layers, np.stack(by_formula), net
        )
    return ours, expected


def structure(row):
    return golden_library.structure_of(CONFIGS[row])


def label(name, rows, net):
    return [f"{name} {p}, configuration {row}" for row in rows for p in net.param_names]


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
@pytest.mark.parametrize("name", golden.NETS)
def test_multipliers(name, precision_name):
    """Against the maps of the recorded float64 metrics, every row of them."""
    ours, expected = rates(name, precision_name)
    tolerance = 1e-9 if precision_name == "x64" else 1e-3
    failures = RECORD.compare(
        "multipliers, to the formulas",
        precision_name,
        np.abs(ours - expected).ravel(),
        tolerance,
        label(name, range(len(CONFIGS)), golden.net(name)),
    )
    assert not failures, "\n".join(failures[:20])


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
def test_rates(precision_name):
    """Against the recorded rates, but for what is listed."""
    found = {}
    tolerance = 1e-6 if precision_name == "x64" else 1e-3
    for name in golden.NETS:
        net = golden.net(name)
        ours, _ = rates(name, precision_name)
        published = net.arrays["lr_f64"] / SHARED["untuned_lr"]
        for row in range(len(CONFIGS)):
            failed = row in net.info["lr_failures"]
            state = state_of(published[row], failed=failed)
            deviation = np.abs(ours[row] - published[row])
            if state == "finite" and deviation.max() <= tolerance:
                places = label(name, [row], net)
                RECORD.compare("rates", precision_name, deviation, tolerance, places)
                continue
            untouched = np.all(ours[row] == 1)
            found[name, row] = (state, "untouched" if untouched else "others")
    table = (*DEVIATIONS, *noise_deviations())
    assert_as_listed(table, "rate", precision_name, found, RECORD)


# Every fit, floor and map, metrics of both routes, every choice of first and last
# layer, and norms by name, by order and not at all, on a net of convolutions, linear
# layers and norms of two kinds; a few of them in 64 bit on a net of linear layers.
WHOLE = {
    ("custom_heavy", "float32"): (29, 42, 117, 192, 195, 198, 207, 213, 222),
    ("attn_init", "x64"): (0, 198, 200, 222),
}


@pytest.mark.parametrize(("name", "precision_name"), WHOLE)
def test_whole_analysis(name, precision_name):
    """From the parameters to their multipliers by `layer_analysis` alone."""
    net = golden.net(name)
    params = net.tree(precision_name)
    ours, _ = rates(name, precision_name)
    tolerance = 1e-9 if precision_name == "x64" else 1e-3

    def group(row):
        return structure(row), golden_library.is_gram(CONFIGS[row])

    failures = []
    for _, rows in itertools.groupby(
        sorted(WHOLE[name, precision_name], key=group), group
    ):
        rows = list(rows)
        analyses = []
        for config in [CONFIGS[row] for row in rows]:
            layers, _ = golden_library.selected_layers(net, config)
            analyses.append(
                tb_optax.layer_analysis(
                    layers,
                    fit=golden_library.fit_of(config),
                    metric=golden_library.METRICS[config["esd_metric_for_tb"]],
                    assign=golden_library.map_of(config),
                    min_eigenvalues=config["eigs_thresh"],
                    eigenvalue_floor=golden.floor_of(config),
                    conv_norm=config["conv_norm"],
                )
            )
        with golden_library.precision(precision_name):
            results = golden_library.run_together(
                analyses, params, lambda result: result.leaf_multipliers(params)
            )
        for row, result in zip(rows, results, strict=True):
            found = np.asarray([result[param].item() for param in net.param_names])
            failures += RECORD.compare(
                "whole analysis, to its parts",
                precision_name,
                np.abs(found - ours[row]),
                tolerance,
                label(name, [row], net),
            )
    assert not failures, "\n".join(failures[:20])
