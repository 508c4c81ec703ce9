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
import jax
import numpy as np
import pytest
from golden_deviations import Deviation, assert_as_listed, listed_in, state_of, where

import tb_optax

RECORD = golden_record.Record("learning rates of the nets")
SHARED = golden.shared()
CONFIGS = SHARED["lr_configs"]
COLUMNS = SHARED["metric_columns"]

every_precision = pytest.mark.parametrize("precision_name", golden.PRECISIONS)
NOISE = "xmin is rounding noise of float32 Gram matrices: its layer is left alone"

# "untouched": every multiplier is 1; "others": the remaining layers are balanced among
# themselves.
DEVIATIONS = listed_in("deviations_rates")


@functools.cache
def noise_deviations():
    """Rows with a layer that float32 cannot fit among those to be tuned."""
    same = where(CONFIGS, lr_min_ratio=1.0, lr_max_ratio=1.0)
    result = []
    for name in sorted({name for name, _ in golden_fits.NOT_FITTED}):
        net = golden.net(name)
        listed = [own.configs for own in DEVIATIONS if name in own.cases]
        rows = set()
        for row, config in enumerate(CONFIGS):
            _, kept = golden_library.selected_layers(net, config)
            counts = net.arrays["metrics_f64d"][0, kept, COLUMNS.index("eigs_num")]
            for layer, count in zip(net.layer_names[kept], counts, strict=True):
                positions = golden_fits.NOT_FITTED.get((name, layer), ())
                if (
                    golden_library.is_gram(config)
                    and config["xmin_pos"] in positions
                    and count >= config["eigs_thresh"]
                ):
                    rows.add(row)
        rows = frozenset(rows - same).difference(*listed)
        result.append(
            Deviation("rate", (name,), rows, "finite", "others", NOISE, ("float32",))
        )
    return tuple(result)


def published_scores(net, config, table, precision_name):
    """The recorded float64 scores, of a tied tail where float32 chose another."""
    row = golden.metric_row(config)
    column = COLUMNS.index(config["esd_metric_for_tb"])
    scores = net.arrays["metrics_f64d"][row, :, column].copy()
    if config["pl_fitting"] != "median":
        assert config["esd_metric_for_tb"] == "alpha"
        for i in np.flatnonzero(table.fitted):
            place = net.name, net.layer_names[i], row, precision_name
            scores[i] = golden_fits.accepted_alpha(*place, float(table.alpha[i]))
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
        for config in [CONFIGS[row] for row in rows]:
            table = golden_library.tables_of(config, precision_name)[name]
            analysis = golden_library.rows_of(table, layers, kept)
            with golden_library.precision(precision_name):
                by_layer.append(golden_library.balance(analysis, config)[0])
            scores = published_scores(net, config, table, precision_name)[kept]
            tuned = analysis.eigenvalue_count >= config["eigs_thresh"]
            tuned = tuned & analysis.fitted
            formula = golden_library.expected_multipliers(scores, tuned, config)
            by_formula.append(formula)
        ours[rows] = golden_library.leaf_values(np.stack(by_layer), own)
        formulas = np.stack(by_formula)
        expected[rows] = golden_library.expected_leaf_values(layers, formulas, net)
    return ours, expected


def structure(row):
    return golden_library.structure_of(CONFIGS[row])


@every_precision
@pytest.mark.parametrize("name", golden.NETS)
def test_multipliers(name, precision_name):
    """Against the maps of the recorded float64 metrics, every row of them."""
    tolerance = 1e-9 if precision_name == "x64" else 1e-3
    what = "multipliers, to the formulas"
    for row, (ours, expected) in enumerate(
        zip(*rates(name, precision_name), strict=True)
    ):
        place = f"{name}, configuration {row}"
        deviation = np.abs(ours - expected)
        RECORD.compare(what, precision_name, deviation, tolerance, place)


@every_precision
def test_rates(precision_name):
    """Against the recorded rates, but for what is listed."""
    found = {}
    tolerance = 1e-6 if precision_name == "x64" else 1e-3
    for name, row in itertools.product(golden.NETS, range(len(CONFIGS))):
        net, ours = golden.net(name), rates(name, precision_name)[0][row]
        published = net.arrays["lr_f64"][row] / SHARED["untuned_lr"]
        state = state_of(published, failed=row in net.info["lr_failures"])
        deviation = np.abs(ours - published)
        if state == "finite" and deviation.max() <= tolerance:
            place = f"{name}, configuration {row}"
            RECORD.compare("rates", precision_name, deviation, tolerance, place)
        else:
            found[name, row] = (state, "untouched" if np.all(ours == 1) else "others")
    table = (*DEVIATIONS, *noise_deviations())
    assert_as_listed(table, "rate", precision_name, found, RECORD)


@every_precision
@pytest.mark.parametrize("name", golden.TRAINED)
def test_rates_of_trained_nets(name, precision_name):
    """By the defaults of the library; recorded from a float32 run."""
    net = golden.net(name)
    layers = net.layers(norms=net.info["bn_map_name"])[1:-1]
    params = net.tree(precision_name)
    with golden_library.precision(precision_name):
        leaves = tb_optax.layer_analysis(layers)(params).leaf_multipliers(params)
    ours = np.asarray([leaves[param].item() for param in net.param_names])
    recorded = net.arrays["lr_f32"] / 0.1
    tolerance = 1e-6 if precision_name == "x64" else 1e-3
    deviation = np.abs(ours - recorded)
    RECORD.compare("rates", precision_name, deviation, tolerance, name)
    assert np.sum(recorded != 1) == 3 * len(layers)


# Every fit, floor and map, metrics of both routes, every choice of first and last
# layer, and norms by name, by order and not at all, on a net of convolutions, linear
# layers and norms of two kinds, which takes long; by default, a few of them in 64 bit
# on a net of linear layers, and those of the trained nets.
WHOLE = {
    ("custom_heavy", "float32"): (29, 42, 117, 192, 195, 198, 207, 213, 222),
    ("attn_init", "x64"): (0, 198, 200, 222),
}


@pytest.mark.parametrize(
    ("name", "precision_name"),
    [
        pytest.param(*case, marks=[pytest.mark.long] if case[1] == "float32" else [])
        for case in WHOLE
    ],
)
def test_whole_analysis(name, precision_name):
    """From the parameters to their multipliers by `layer_analysis` alone."""
    net = golden.net(name)
    params = net.tree(precision_name)
    ours, _ = rates(name, precision_name)
    tolerance = 1e-9 if precision_name == "x64" else 1e-3

    def group(row):
        return structure(row), golden_library.is_gram(CONFIGS[row])

    def analysis_of(config):
        return tb_optax.layer_analysis(
            golden_library.selected_layers(net, config)[0],
            fit=golden_library.fit_of(config),
            metric=golden_library.METRICS[config["esd_metric_for_tb"]],
            assign=golden_library.map_of(config),
            min_eigenvalues=config["eigs_thresh"],
            eigenvalue_floor=golden.floor_of(config),
            conv_norm=config["conv_norm"],
        )

    # Of each group the decompositions are the same: one program does them once.
    whole = sorted(WHOLE[name, precision_name], key=group)
    for _, rows in itertools.groupby(whole, group):
        rows = list(rows)
        analyses = [analysis_of(CONFIGS[row]) for row in rows]

        @jax.jit
        def together(params, analyses=analyses):
            return [analyze(params).leaf_multipliers(params) for analyze in analyses]

        with golden_library.precision(precision_name):
            results = together(params)
        for row, result in zip(rows, results, strict=True):
            found = np.asarray([result[param].item() for param in net.param_names])
            what, place = "whole analysis, to its parts", f"{name}, configuration {row}"
            deviation = np.abs(found - ours[row])
            RECORD.compare(what, precision_name, deviation, tolerance, place)
