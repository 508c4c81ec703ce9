"""Parity of exponents, maps and rates with the published relatives, in both precisions.

Where the library deviates on purpose, the test says by which rule, and holds it to the
rule. `-s` prints the largest deviations, of which docs/family.md has the table.
"""

import functools

import family
import golden_library
import golden_record
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family import SUFFIX, block_number, recorded
from golden import PRECISIONS

import tb_optax
from tb_optax import linear, mean_one

RECORD = golden_record.Record("relatives")
check = RECORD.hold


every_precision = pytest.mark.parametrize("precision", PRECISIONS)


# --- columns ------------------------------------------------------------------------


def columns_of(table, name=""):
    """Columns by the published names; AlphaDecay has a softplus around one of them."""
    alpha_hat, norm = table.alpha_hat, table.frobenius_norm**2
    if name.startswith("alpha_decay"):
        alpha_hat = np.logaddexp(0, alpha_hat)
    return {
        "alpha": table.alpha,
        "D": table.ks_distance,
        "spectral_norm": table.spectral_norm**2,
        "norm": norm,
        "fnorm": norm,
        "stable_rank": table.stable_rank,
        "norm_stable_rank": norm / table.eigenvalue_count,
        "entropy": table.entropy,
        "eigs_num": table.eigenvalue_count,
        "alphahat": alpha_hat,
    }


def check_columns(name, config, columns, published, precision):
    """Hold the columns of a net to the published ones, for the layers it analyzes."""
    table = family.table_of(name, config, precision)
    analyzed = np.isfinite(published[:, 0])
    enough = table.eigenvalue_count >= config.get("eigs_num_thresh", 0)
    np.testing.assert_array_equal(analyzed, enough)
    kept = analyzed & table.fitted
    # One kernel is noise to Gram matrices in float32.
    noise = name == "lm_transformer" and precision == "float32"
    assert kept.sum() >= analyzed.sum() - noise
    # Published ranks are those of the tail, and of what the floor keeps.
    other_rank = config.get("sr_mid_pos") or family.has_floor(config)
    for column, found in columns_of(table, name).items():
        if column not in columns or (other_rank and "rank" in column):
            continue
        own = published[kept, columns.index(column)]
        tolerance = golden_record.TOLERANCE[precision]
        if name == "lm_transformer" and precision == "x64":
            # Its float64 run took ranks and tables of candidates in float32.
            median = family.fit_key(config)[0] == "median"
            tolerance = tolerance if median and column != "D" else 1e-6
        what = f"columns of {name}"
        check(what, precision, found[kept], own, column, tolerance)


@every_precision
@pytest.mark.parametrize("name", [n for n in family.NETS if n != "alpha_pruning"])
def test_columns_of_every_fit(name, precision):
    """Columns of gradients and the ratio to the median eigenvalue are none of ours."""
    info, arrays = recorded(name)
    published = arrays[f"metrics_{SUFFIX[precision]}"]
    for config, own in zip(info["metric_configs"], published, strict=True):
        check_columns(name, config, info["metric_columns"], own, precision)


@every_precision
def test_columns_of_alpha_pruning(precision):
    """Its estimator runs in float32 alone."""
    info, arrays = recorded("alpha_pruning")
    for fit in ("xmin_mid", "xmin_peak"):
        config = {"fix_fingers": fit, "xmin_pos": 2}
        table = family.table_of("alpha_pruning", config, precision)
        for place, column in enumerate(info["estimator_columns"]):
            own = arrays[f"estimator/{fit}"][:, place]
            found = columns_of(table)[column]
            check("columns of alpha_pruning", precision, found, own, column, 1e-4)


# --- maps ---------------------------------------------------------------------------


def check_map(scores, names, config, kind, published, precision, where):
    """Hold a rule for "lr" or "wd" to what the published code made of these scores."""
    rule, (assign, groups) = rule_of(config, kind)
    make = functools.partial(family.multipliers, assign=assign, groups=groups, pad=144)
    usable = np.isfinite(scores)
    with golden_library.precision(precision):
        found = make(scores, names)
        if not usable.all():  # There it spoils many layers; here it is left out.
            others = [name for name, fine in zip(names, usable, strict=True) if fine]
            expected = make(scores[usable], others)
            np.testing.assert_allclose(found[usable], expected, rtol=1e-6)
            assert (found[~usable] == 1).all()
            return
    if rule == "tb_log2" and (scores < 1).any():
        assert (found[scores < 1] == 1).all()
        return
    method = "AlphaDecay" if "assign_func" in config else "Model Balancing"
    if rule == "tbr":  # Tied scores: here in the order of the layers.
        found, published = np.sort(found), np.sort(published)
    if rule in family.BY_NAME and method == "AlphaDecay":
        # Published shares have 1e-8 added to each term of the sum.
        values = {"tb_sqrt": np.sqrt, "tb_log2": np.log2}[rule](scores)
        found = found * values.sum() / (values.sum() + len(scores) * 1e-8)
    compared = ~flat_places(scores, names, rule, config)
    what = f"multipliers of {method}"
    check(what, precision, found[compared], published[compared], where)


def flat_places(scores, names, rule, config):
    """Where equal scores decide: 1 here; there an end of the range, or any order."""
    layers = [family.linear_layer(name) for name in names]
    none = np.zeros(len(names), bool)
    inner = []
    if rule == "tb_layer_blocks":
        blocks = members_of(block_number, layers)
        means = np.asarray([scores[own].mean() for own in blocks])
        flat = len(means) > 0 and np.ptp(means) <= 1e-12
        ties = len(np.unique(means.round(12))) < len(means) or len(means) == 1
        of_schedule = {"rank": ties, "linear_map": flat}
        unit = config["tb_unit"]
        if unit != "sliding_window" and of_schedule.get(config["schedule_func"]):
            return ~none
        inner = blocks if unit == "layer" else []
    elif rule == "tb_layer_groups":
        inner = members_of(family.name_without_number, layers)
    elif rule in ("tb_linear_map", "tbr"):
        return none | (np.ptp(scores) == 0)
    for own in inner:
        none |= own & (np.ptp(scores[own]) == 0)
    # One such end moves the mean of all.
    return none | (none.any() and config["tb_lr_normalize"] == "True")


def members_of(groups, layers):
    names = [groups(layer) for layer in layers]
    distinct = [name for name in dict.fromkeys(names) if name is not None]
    return [np.asarray([name == own for name in names]) for own in distinct]


def rule_of(config, kind):
    """The published name of a rule, and the library's map and groups for it."""
    if "assign_func" in config:
        return config["assign_func"], (family.map_of_decay(config), None)
    config = {"temp_balance": config.get(f"temp_balance_{kind}")} | config
    return config["temp_balance"], family.map_of_balancing(config, kind)


@pytest.mark.parametrize(
    "precision", [pytest.param("float32", marks=pytest.mark.long), "x64"]
)
@pytest.mark.parametrize("method", ["alpha_decay", "model_balancing"])
def test_maps_of_given_scores(method, precision):
    info, arrays = recorded(f"{method}_maps")
    for vector in info["vectors"]:
        name, names = vector["name"], vector["layer_names"]
        for row, config in enumerate(info["configs"]):
            if vector["status"][row] != "ok":
                continue  # It asks for a third part of names.
            base = config.get("epoch_val", config.get("untuned_wd"))
            kind, scores = config.get("hyperparam", "wd"), arrays[f"scores/{name}"]
            published, where = arrays[f"value/{name}"][row] / base, f"{name}, {row}"
            check_map(scores, names, config, kind, published, precision, where)


@every_precision
@pytest.mark.parametrize("name", [n for n in family.NETS if "balancing" in n])
def test_maps_of_model_balancing(name, precision):
    """Scores, rates and decays of the layers, and of all parameters."""
    info, arrays = recorded(name)
    suffix, names = SUFFIX[precision], info["layer_names"]
    blocks = family.balanced_layers(info)
    place = [names.index(layer.path.removesuffix(".weight")) for layer in blocks]
    (owners,) = golden_library.leaf_owners([blocks], family.net(name))
    decays = np.isin(info["param_names"], info["decay_parameters"])
    for row, over in enumerate(info["map_configs"]):
        config = info["map_defaults"] | over
        if config["metric"] == "eig_ratio":  # No column of ours.
            continue
        table = family.table_of(name, config, precision)
        of_layers = arrays[f"layer_lr_wd_{suffix}"][row] / [info["base_lr"], 0.1]
        expected = arrays[f"score_{suffix}"][row]
        kept = np.flatnonzero(np.isfinite(expected))
        scores = columns_of(table)[config["metric"]][kept]
        check("scores", precision, scores, expected[kept], f"{name}, {row}")
        for kind, published in zip(("lr", "wd"), of_layers.T, strict=True):
            if config["hyperparam_to_tune"] not in (kind, "hybrid"):
                np.testing.assert_allclose(published[kept], 1)
                continue
            own, where = [names[i] for i in kept], f"{name}, {row}, {kind}"
            check_map(scores, own, config, kind, published[kept], precision, where)
        if info[f"param_status_{suffix}"][row] != "ok":
            continue  # There a layer without a score in a block ends the training.
        rate, decay = (arrays[f"param_lr_wd_{suffix}"][row] / [info["base_lr"], 0.1]).T
        own_rate, own_decay = golden_library.leaf_values(of_layers.T[:, place], owners)
        where = f"{name}, {row}, parameters"
        check("parameters", precision, own_rate, rate, where)
        check("parameters", precision, own_decay * decays, decay, where)


@every_precision
@pytest.mark.parametrize("name", [n for n in family.NETS if "decay" in n])
def test_maps_of_alpha_decay(name, precision):
    info, arrays = recorded(name)
    suffix, names = SUFFIX[precision], info["layer_names"]
    for row, over in enumerate(info["map_configs"]):
        config = info["map_defaults"] | over
        metric = config["esd_metric_for_tb"]
        if info[f"map_status_{suffix}"][row] != "ok" or "grad" in metric:
            continue
        table = family.table_of(name, config, precision)
        first = int(config["remove_first_layer"])
        kept = np.arange(first, len(names) - int(config["remove_last_layer"]))
        kept = kept[table.eigenvalue_count[kept] >= config["eigs_thresh"]]
        own = [names[i] for i in kept]
        places = [info["param_names"].index(f"{layer}.weight") for layer in own]
        published = arrays[f"param_wd_{suffix}"][row] / info["base_wd"]
        scores, where = columns_of(table, name)[metric][kept], f"{name}, {row}"
        check_map(scores, own, config, "wd", published[places], precision, where)
        np.testing.assert_array_equal(np.delete(published, places), 1)


@every_precision
def test_ratios_of_alpha_pruning(precision):
    """The published product of target and sum is rounded to float32.

    The copy in FARMS clips afterwards, and so loses the mean.
    """
    info, arrays = recorded("alpha_pruning")
    compared = 0
    for case in info["cases"]:
        name, names = case["name"], case["layer_names"]
        scores, sizes = arrays[f"{name}/metric"], arrays[f"{name}/numel"]
        in_run = {x: i // (len(names) // case["blocks"]) for i, x in enumerate(names)}

        def by_run(layer, in_run=in_run):
            return in_run.get(layer.path)

        for row, config in enumerate(info["configs"]):
            bounds = linear(1 - config["epsilon"], 1 + config["epsilon"])
            assign = mean_one(bounds, by_size=True)
            blocks = config["mapping_type"] == "block_wise"
            groups = by_run if blocks else None
            options = {"groups": groups, "sizes": sizes.tolist(), "pad": 224}
            with golden_library.precision(precision):
                found = family.multipliers(scores, names, assign, **options)
            target = config["sparsity_ratio"]
            ratios = target * found
            published = arrays[f"{name}/ratio"][row]
            assert np.isfinite(ratios).all()
            if np.isnan(published).any():  # Equal or non-finite scores.
                continue
            tolerance = max(1e-7, golden_record.TOLERANCE[precision])
            check("ratios", precision, ratios, published, f"{name}, {row}", tolerance)
            copy = arrays[f"{name}/farms_copy_ratio"][row]
            if blocks and np.isfinite(copy).all():
                most = 0.99999 if target == 0.7 else 0.998
                clipped = np.where(ratios > 1, most, ratios)
                check("ratios", precision, clipped, copy, f"{name}, {row}", tolerance)
            compared += 1
    assert compared > 100


# --- the language model of TempBalance ----------------------------------------------

LM_DEFAULTS = {
    "assign_func": "tb_linear_map",
    "batchnorm": False,
    "batchnorm_type": "name",
    "eigs_thresh": 1,
    "esd_metric_for_tb": "alpha",
    "layernorm": True,
    "lr_max_ratio": 1.5,
    "lr_min_ratio": 0.5,
    "remove_few_eigs_layer": True,
    "remove_first_layer": False,
    "remove_last_layer": False,
}


@every_precision
def test_rates_of_the_language_model(precision):
    """Every parameter under every rule; the rates are those of a float32 run.

    By singular values: by Gram matrices one kernel is noise in float32.
    """
    net, (info, arrays) = family.net("lm_transformer"), recorded("lm_transformer")
    table = family.tables(precision)["singular values"]["lm_transformer"]
    for row, over in enumerate(info["lr_configs"]):
        if info["lr_status_f32"][row] != "ok":
            assert np.isnan(arrays["lr_f32"][row]).all()
            continue
        config = LM_DEFAULTS | over
        if not config["remove_few_eigs_layer"]:
            config["eigs_thresh"] = 0
        layers, kept = golden_library.selected_layers(net, config)
        with golden_library.precision(precision):
            analysis = golden_library.rows_of(table, layers, kept)
            found, _ = golden_library.balance(analysis, config)
        (owners,) = golden_library.leaf_owners([layers], net)
        rates = info["untuned_lr"] * golden_library.leaf_values(found, owners)
        check("rates", precision, rates, arrays["lr_f32"][row], f"lm, {row}", 1e-4)


@pytest.mark.usefixtures("x64")
def test_schedules_of_the_language_model():
    """At its refreshes; between two the published code repeats all rates."""
    net, (info, arrays) = family.net("lm_transformer"), recorded("lm_transformer")
    weights = [
        {
            path: jnp.asarray(arrays.get(f"{prefix}/{path}", leaf), float)
            for path, leaf in net.params.items()
        }
        for prefix in ("param_a", "param_b")
    ]
    layers, _ = golden_library.selected_layers(net, LM_DEFAULTS)
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=1)
    compared = 0
    for number, schedule in enumerate(info["schedules"]):
        start, interval = schedule["warmup_steps"], schedule["tb_interval"]
        rates = arrays[f"schedule/{number}/untuned_lr"][1:]
        tx = optax.chain(
            optax.scale_by_schedule(lambda t, rates=rates: jnp.asarray(rates)[t]),
            tb_optax.scale_by_temp_balance(analyze, interval=interval, start=start),
        )
        update, state = jax.jit(tx.update), tx.init(weights[0])
        ones = jax.tree.map(jnp.ones_like, weights[0])
        for step in range(len(rates)):
            params = weights[step >= schedule["weights_switch_to_b_before_update"]]
            updates, state = update(ones, state, params)
            if step >= start and step % interval == 0:
                found = np.asarray([updates[path].ravel()[0] for path in net.params])
                published = arrays[f"schedule/{number}/lr"][step + 1]
                check("rates", "x64", found, published, f"{number}, {step}", 1e-4)
                compared += 1
    assert compared == 12 + 8 + 2 + 3
