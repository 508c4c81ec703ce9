"""Learning rates of all parameters of all nets, under all recorded configurations.

224 configurations for each of 14 nets, and 31 for each degenerate one, would be
thousands of compilations. They share the analyses of `test_golden_metrics`: the rows
of the layers that a configuration keeps go through the library's map, and its
`layer_of_leaf` says which parameters follow. `test_whole_analysis` compares that with
`layer_analysis`. `data/deviations_*.json` list where library and published code
disagree: "untouched" says that every multiplier is 1, "others" that the remaining
layers are balanced among themselves.
"""

from typing import Any

import golden
import golden_fits
import golden_library
import numpy as np
import pytest

import tb_optax

CONFIGS = golden.shared()["lr_configs"]
EDGE = golden.read_json("edge_cases")
MAPS = ("tb_linear_map", "tb_sqrt", "tb_log2", "tb_step")
NETS = {name: golden.net(name) for name in golden.NETS}
NOISE = "xmin is rounding noise of float32 Gram matrices: its layer is left alone"

every_precision = pytest.mark.parametrize("precision_name", golden.PRECISIONS)


def noise_deviations(listed):
    """Rows with a layer that float32 cannot fit among those to be tuned."""
    count = golden.shared()["metric_columns"].index("eigs_num")
    for name in sorted({name for name, _ in golden_fits.NOT_FITTED}):
        net = NETS[name]
        named = {row for x in listed if name in x.cases for row in x.configs}
        named |= golden.rows_with(CONFIGS, lr_min_ratio=1.0, lr_max_ratio=1.0)
        rows = set()
        for row, config in enumerate(CONFIGS):
            if row in named or not golden_library.is_gram(config):
                continue
            _, kept = golden_library.selected_layers(net, config)
            counts = net.arrays["metrics_f64d"][0, kept, count]
            for layer, own in zip(net.layer_names[kept], counts, strict=True):
                lost = golden_fits.NOT_FITTED.get((name, layer), ())
                if config["xmin_pos"] in lost and own >= config["eigs_thresh"]:
                    rows.add(row)
        yield golden.Deviation(
            "rate", (name,), frozenset(rows), "finite", "others", NOISE, ("float32",)
        )


def deviations_of(nets, prefix, configs, published, tolerance, precision_name):
    """What deviates from the published rates; to the formulas everything agrees."""
    found, failures = {}, []
    for row, config in configs.items():
        both = golden_library.leaf_multipliers(
            {prefix + name: net for name, net in nets.items()}, config, precision_name
        )
        for name, net in nets.items():
            ours, formula = both[prefix + name]
            exact = 1e-12 if precision_name == "x64" else 1e-5
            deviation = np.abs(ours - formula)
            failures += golden.beyond("rates", f"{name}, {row}", deviation, exact)
            rates = published(net)[row]
            failed = row in net.info["lr_failures"]
            state = golden.state_of(rates, failed=failed)
            if state != "finite" or np.abs(ours - rates).max() > tolerance:
                found[name, row] = (
                    state,
                    "untouched" if np.all(ours == 1) else "others",
                )
    assert not failures, "\n".join(failures[:20])
    return found


@every_precision
def test_rates(precision_name):
    found = deviations_of(
        NETS,
        "",
        dict(enumerate(CONFIGS)),
        lambda net: net.arrays["lr_f64"] / golden.shared()["untuned_lr"],
        1e-6 if precision_name == "x64" else 1e-3,
        precision_name,
    )
    listed = golden.deviations("rates")
    table = (*listed, *noise_deviations(listed))
    golden.assert_as_listed(table, "rate", precision_name, found)


@every_precision
def test_rates_of_degenerate_nets(precision_name):
    nets = {name: net for name, net in golden.edge_cases().items() if net.layer_names}
    # Without the row of a map that does not exist, which a function cannot be.
    configs = {
        row: config
        for row, config in enumerate(EDGE["lr_configs"])
        if config["assign_func"] in MAPS
    }
    found = deviations_of(
        nets,
        "edge/",
        configs,
        lambda net: net.arrays["lr_f32"] / EDGE["untuned_lr"],
        1e-3,
        precision_name,
    )
    table = golden.deviations("edge_cases")
    golden.assert_as_listed(table, "rate", precision_name, found)


def test_what_the_library_refuses():
    """No layer at all, and the last configuration: a map that does not exist."""
    net = golden.edge_cases()["no_layers"]
    assert len(net.info["lr_failures"]) < len(EDGE["lr_configs"])
    with pytest.raises(ValueError, match="no layer to balance"):
        tb_optax.layer_analysis([])(net.tree("float32"))
    assert EDGE["lr_configs"][30]["assign_func"] == "nonsense"
    nonsense: Any = "nonsense"
    assert all(30 in net.info["lr_failures"] for net in golden.edge_cases().values())
    # A TypeError where the types of arguments are checked, as in these tests.
    with pytest.raises((ValueError, TypeError), match="assign"):
        tb_optax.layer_analysis(assign=nonsense)


def whole(net, analyze, precision_name):
    """The multipliers of all parameters by `layer_analysis` alone."""
    params = net.tree(precision_name)
    with golden_library.precision(precision_name):
        leaves = analyze(params).leaf_multipliers(params)
    return np.asarray([leaves[path].item() for path in net.param_names])


# Steps by order from a Gram matrix, and square roots of a fit near the peak, on a net
# of convolutions with norms; LayerNorms and the metric D on one of linear layers.
WHOLE = [("vggnum_heavy", 161), ("vggnum_heavy", 195)]
WHOLE += [("attn_init", 213), ("attn_init", 222)]


@pytest.mark.parametrize(("name", "row"), WHOLE)
def test_whole_analysis(name, row):
    net, config = NETS[name], CONFIGS[row]
    expected = golden_library.leaf_multipliers({name: net}, config, "float32")[name][0]
    layers, _ = golden_library.selected_layers(net, config)
    found = whole(net, golden_library.analysis_of(layers, config), "float32")
    assert len(set(expected.tolist())) > 2
    np.testing.assert_allclose(found, expected, atol=1e-3)


@every_precision
@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_rates_of_trained_resnets(name, precision_name):
    """By the defaults of the library; recorded from a float32 run."""
    net = golden.net(f"checkpoint/{name}")
    layers = net.layers(net.info["bn_map_name"])[1:-1]
    found = whole(net, tb_optax.layer_analysis(layers), precision_name)
    recorded = np.asarray([net.info["rates"][path] for path in net.param_names]) / 0.1
    tolerance = 1e-6 if precision_name == "x64" else 1e-3
    np.testing.assert_allclose(found, recorded, rtol=0, atol=tolerance)
    assert np.sum(recorded != 1) == 3 * len(layers)
