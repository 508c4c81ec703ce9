"""Parity of exponents and maps with the published relatives, in both precisions.

Where the library deviates on purpose, the test says by which rule, and holds it to the
rule.
"""

import family
import golden_library
import numpy as np
import pytest
from family import block_number, fit_of, has_floor, recorded, third_part
from golden import PRECISIONS

import tb_optax
from tb_optax import linear, mean_one, nested, standard_sigmoid

# Of figures of the published code run in float64, or in float32.
TOLERANCE = {"x64": 1e-9, "float32": 1e-4}
SUFFIX = {"x64": "f64", "float32": "f32"}

pytestmark = pytest.mark.usefixtures("quick_compilation")

every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def assert_close(found, published, precision, where):
    tolerance = TOLERANCE[precision] * np.maximum(1, np.abs(published))
    wrong = ~(np.abs(found - published) <= tolerance)
    assert not wrong.any(), f"{where}: {found[wrong][:4]}, {published[wrong][:4]}"


def undone_addend(found, scores, name):
    """Published shares of the relatives have 1e-8 added to each term of the sum."""
    shares = {"tb_sqrt": np.sqrt, "tb_log2": np.log2}[name](scores)
    return found * shares.sum() / (shares.sum() + len(scores) * 1e-8)


# --- Model Balancing ----------------------------------------------------------------


def check_balancing(scores, names, config, kind, published, precision, where):
    """Hold a rule to what the published code made of the same scores."""
    assign, groups = family.map_of_balancing(config, kind)
    if not np.isfinite(scores).all():
        found = family.multipliers(
            np.where(np.isfinite(scores), scores, 0), names, assign, groups=groups
        )
        assert np.isfinite(found).all()
        return
    found = family.multipliers(scores, names, assign, groups=groups, pad=144)
    rule = config["temp_balance"]
    if rule == "tbr":  # Tied scores: here in the order of the layers.
        found, published = np.sort(found), np.sort(published)
    if rule == "tb_log2" and (scores < 1).any():
        assert (found[scores < 1] == 1).all()
        return
    compared = ~flat_places(scores, names, config)
    assert_close(found[compared], published[compared], precision, where)


def flat_places(scores, names, config):
    """Where equal scores decide: 1 here; there an end of the range, or any order."""
    layers = [tb_optax.Layer(name, family.LINEAR) for name in names]
    rule, unit = config["temp_balance"], config["tb_unit"]
    none = np.zeros(len(names), bool)
    if rule == "tb_layer_blocks":
        blocks = members_of(block_number, layers)
        means = np.asarray([scores[own].mean() for own in blocks])
        if len(means) and config["schedule_func"] == "rank":
            ties = len(np.unique(means.round(12))) < len(means)
        else:
            linear_map = config["schedule_func"] == "linear_map"
            ties = linear_map and len(means) > 0 and np.ptp(means) <= 1e-12
        alone = config["schedule_func"] == "rank" and len(means) == 1
        if unit != "sliding_window" and (ties or alone):
            return ~none
        inner = blocks if unit == "layer" else []
    elif rule == "tb_layer_groups":
        inner = members_of(family.name_without_number, layers)
    else:
        return none | (np.ptp(scores) == 0 and rule in ("tb_linear_map", "tbr"))
    for own in inner:
        none |= own & (np.ptp(scores[own]) == 0)
    # One such end moves the mean of all.
    return none | (none.any() and config["tb_lr_normalize"] == "True")


def members_of(groups, layers):
    names = [groups(layer) for layer in layers]
    distinct = [name for name in dict.fromkeys(names) if name is not None]
    return [np.asarray([name == own for name in names]) for own in distinct]


def test_maps_of_model_balancing(x64):
    del x64
    info, arrays = recorded("model_balancing_maps")
    for number, vector in enumerate(info["vectors"]):
        name, names = vector["name"], vector["layer_names"]
        scores = arrays[f"scores/{name}"]
        for row, config in enumerate(info["configs"]):
            # Half of the pairs, to save time.
            if vector["status"][row] != "ok" or (row + number) % 2:
                continue
            published = arrays[f"value/{name}"][row] / config["epoch_val"]
            where, kind = f"{name}, {row}", config["hyperparam"]
            check_balancing(scores, names, config, kind, published, "x64", where)


@every_precision
@pytest.mark.parametrize("net", [n for n in family.NETS if "balancing" in n])
def test_nets_of_model_balancing(net, precision):
    """Columns of every fit; rates and decays of every rule."""
    info, arrays = recorded(net)
    columns, names = info["metric_columns"], info["layer_names"]
    for row, config in enumerate(info["metric_configs"]):
        wanted = (fit_of(config), has_floor(config))
        table = family.table_of(net, OPTIONS, wanted, precision)
        published = arrays[f"metrics_{SUFFIX[precision]}"][row]
        kept = np.isfinite(published[:, 0])
        enough = table.eigenvalue_count >= config["eigs_num_thresh"]
        np.testing.assert_array_equal(kept, enough)
        for column, found in columns_of(table).items():
            # Published ranks are those of the tail, and of what the floor keeps.
            other_rank = config["sr_mid_pos"] or has_floor(config)
            if column not in columns or (other_rank and "rank" in column):
                continue
            own = published[kept, columns.index(column)]
            assert_close(found[kept], own, precision, f"{net}, {row}, {column}")
    for row, over in enumerate(info["map_configs"]):
        config = info["map_defaults"] | over
        if config["metric"] == "eig_ratio":  # No column of ours.
            continue
        table = family.table_of(
            net, OPTIONS, (fit_of(config), has_floor(config)), precision
        )
        recorded_scores = arrays[f"score_{SUFFIX[precision]}"][row]
        kept = np.flatnonzero(np.isfinite(recorded_scores))
        scores = columns_of(table)[config["metric"]][kept]
        assert_close(scores, recorded_scores[kept], precision, f"{net}, {row}")
        for kind, place, base in (("lr", 0, info["base_lr"]), ("wd", 1, 0.1)):
            own = config | {"temp_balance": config[f"temp_balance_{kind}"]}
            published = arrays[f"layer_lr_wd_{SUFFIX[precision]}"][row, kept, place]
            if config["hyperparam_to_tune"] not in (kind, "hybrid"):
                np.testing.assert_allclose(published, base)
                continue
            with golden_library.precision(precision):
                check_balancing(
                    scores,
                    [names[i] for i in kept],
                    own,
                    kind,
                    published / base,
                    precision,
                    f"{net}, {row}, {kind}",
                )


# --- AlphaDecay ---------------------------------------------------------------------


def map_of_decay(config):
    return {
        "tb_linear_map": linear(config["wd_min_ratio"], config["wd_max_ratio"]),
        "layerwise_sigmoid": nested(
            None, standard_sigmoid(config["sigmoid_alpha"]), third_part
        ),
        **family.BY_NAME,
    }[config["assign_func"]]


def check_decay(scores, names, config, published, precision, where):
    """Hold a rule to what the published code made of the same scores."""
    rule, assign = config["assign_func"], map_of_decay(config)
    usable = np.isfinite(scores)
    if not usable.all():
        found = family.multipliers(np.where(usable, scores, 0), names, assign, pad=96)
        assert np.isfinite(found).all()
        return
    found = family.multipliers(scores, names, assign, pad=96)
    if rule == "tb_log2" and (scores < 1).any():
        assert (found[scores < 1] == 1).all()
        return
    if rule != "layerwise_sigmoid" and np.ptp(scores) == 0:
        assert (found == 1).all()
        return
    if rule in family.BY_NAME:
        found = undone_addend(found, scores, rule)
    assert_close(found, published, precision, where)


def test_maps_of_alpha_decay(x64):
    del x64
    info, arrays = recorded("alpha_decay_maps")
    for vector in info["vectors"]:
        name, names = vector["name"], vector["layer_names"]
        for row, config in enumerate(info["configs"]):
            if vector["status"][row] != "ok":  # It asks for a third part of names.
                continue
            published = arrays[f"value/{name}"][row] / config["untuned_wd"]
            scores, where = arrays[f"scores/{name}"], f"{name}, {row}"
            check_decay(scores, names, config, published, "x64", where)


@every_precision
@pytest.mark.parametrize("net", [n for n in family.NETS if "decay" in n])
def test_nets_of_alpha_decay(net, precision):
    info, arrays = recorded(net)
    names, columns = info["layer_names"], info["metric_columns"]
    for row, config in enumerate(info["metric_configs"]):
        wanted = (fit_of(config), has_floor(config))
        table = family.table_of(net, OPTIONS, wanted, precision)
        found = columns_of(table) | {"alphahat": softplus(table.alpha_hat)}
        published = arrays[f"metrics_{SUFFIX[precision]}"][row]
        for column in columns:
            if column.startswith("gradnorm"):  # No column of ours.
                continue
            own = published[:, columns.index(column)]
            assert_close(found[column], own, precision, f"{net}, {row}, {column}")
    for row, over in enumerate(info["map_configs"]):
        config = info["map_defaults"] | over
        metric = config["esd_metric_for_tb"]
        if info[f"map_status_{SUFFIX[precision]}"][row] != "ok" or "grad" in metric:
            continue
        wanted = (fit_of(config), has_floor(config))
        table = family.table_of(net, OPTIONS, wanted, precision)
        first = int(config["remove_first_layer"])
        kept = np.arange(first, len(names) - int(config["remove_last_layer"]))
        kept = kept[table.eigenvalue_count[kept] >= config["eigs_thresh"]]
        values = columns_of(table) | {"alphahat": softplus(table.alpha_hat)}
        own = [names[i] for i in kept]
        places = [info["param_names"].index(f"{name}.weight") for name in own]
        published = arrays.get(f"param_wd_{SUFFIX[precision]}")
        if published is None:
            continue
        published = published[row] / info["base_wd"]
        where = f"{net}, {row}"
        with golden_library.precision(precision):
            check_decay(
                values[metric][kept], own, config, published[places], precision, where
            )
        np.testing.assert_array_equal(np.delete(published, places), 1)


def softplus(values):
    return np.logaddexp(0, values)


def columns_of(table):
    """Columns by the published names."""
    count = table.eigenvalue_count
    return {
        "alpha": table.alpha,
        "D": table.ks_distance,
        "spectral_norm": table.spectral_norm**2,
        "norm": table.frobenius_norm**2,
        "fnorm": table.frobenius_norm**2,
        "stable_rank": table.stable_rank,
        "norm_stable_rank": table.frobenius_norm**2 / count,
        "entropy": table.entropy,
        "eigs_num": count,
        "alphahat": table.alpha_hat,
    }


def all_options():
    """Every fit, with or without a floor, that a record of a net asks for."""
    configs = [
        config
        for net in family.NETS
        if net != "alpha_pruning"
        for config in recorded(net)[0]["metric_configs"]
    ]
    own = {(fit_of(config), has_floor(config)): None for config in configs}
    return (*own, (tb_optax.fit_median(1.5), False))


OPTIONS = tuple(dict.fromkeys(all_options()))


# --- AlphaPruning, and the language model of TempBalance ----------------------------


def test_ratios_of_alpha_pruning(x64):
    """The published product of target and sum is rounded to float32."""
    del x64
    info, arrays = recorded("alpha_pruning")
    compared = 0
    for case in info["cases"]:
        name, names = case["name"], case["layer_names"]
        scores, sizes = arrays[f"{name}/metric"], arrays[f"{name}/numel"]
        in_run = {x: i // (len(names) // case["blocks"]) for i, x in enumerate(names)}
        for row, config in enumerate(info["configs"]):
            bounds = linear(1 - config["epsilon"], 1 + config["epsilon"])
            blocks = config["mapping_type"] == "block_wise"
            found = family.multipliers(
                np.where(np.isfinite(scores), scores, 0),
                names,
                mean_one(bounds, by_size=True),
                groups=(lambda layer, runs=in_run: runs.get(layer.path))
                if blocks
                else None,
                sizes=sizes.tolist(),
                pad=224,
            )
            ratios = config["sparsity_ratio"] * found
            published = arrays[f"{name}/ratio"][row]
            assert np.isfinite(ratios).all()
            if np.isnan(published).any():  # Equal or non-finite scores.
                continue
            np.testing.assert_allclose(ratios, published, rtol=1e-7, err_msg=f"{row}")
            compared += 1
    assert compared > 100


@every_precision
def test_columns_of_the_language_model(precision):
    """Its float64 run took tables of candidates in float32."""
    info, arrays = recorded("lm_transformer")
    for row, config in enumerate(info["metric_configs"]):
        wanted = (fit_of(config), has_floor(config))
        table = family.table_of("lm_transformer", OPTIONS, wanted, precision)
        published = arrays[f"metrics_{SUFFIX[precision]}"][row][table.fitted]
        assert table.fitted.sum() >= len(table.fitted) - 1
        for place, column in enumerate(info["metric_columns"]):
            found = columns_of(table)[column][table.fitted]
            deviation = np.abs(found - published[:, place])
            tolerance = max(TOLERANCE[precision], 1e-6)
            scale = np.maximum(1, np.abs(published[:, place]))
            assert (deviation <= tolerance * scale).all(), (row, column)
