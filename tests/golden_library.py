"""Drives the library as the published code is configured.

Everything is computed once and shared by the test modules: compiling is what costs.
"""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import reference

import tb_optax
from tb_optax import analysis as pipeline

# Golden name of a metric, to the library's metric that ranks layers alike.
METRICS = {
    "alpha": "alpha",
    "alphahat": "alpha_hat",
    "D": "ks_distance",
    "spectral_norm": lambda analysis: analysis.spectral_norm**2,
    "norm": lambda analysis: analysis.frobenius_norm**2,
}


def precision(name: str) -> contextlib.AbstractContextManager[None]:
    """Runs the library in float32 or with 64-bit types."""
    return jax.enable_x64(name == "x64")


def fit_of(config: Mapping[str, Any]) -> Any:
    """The library's fit for a configuration."""
    if config["pl_fitting"] == "median":
        return tb_optax.fit_median(config["xmin_pos"])
    if config["pl_fitting"] == "goodness-of-fit":
        return tb_optax.fit_min_ks()
    return tb_optax.fit_peak()


def map_of(config: Mapping[str, Any]) -> Any:
    """The library's map for a configuration."""
    low, high = config["lr_min_ratio"], config["lr_max_ratio"]
    return {
        "tb_linear_map": lambda: tb_optax.linear(low, high),
        "tb_sqrt": tb_optax.sqrt,
        "tb_log2": tb_optax.log2,
        "tb_step": lambda: tb_optax.step(low, high),
    }[config["assign_func"]]()


def rows_of(
    table: tb_optax.Analysis, layers: Sequence[tb_optax.Layer], rows: slice
) -> tb_optax.Analysis:
    """Some of the rows of a table on the host, with these layers."""
    part = jax.tree.map(lambda column: column[rows], table)
    return dataclasses.replace(part, layers=tuple(layers))


def is_gram(config: Mapping[str, Any]) -> bool:
    """Whether the analysis takes the route through Gram matrices."""
    distance = config.get("esd_metric_for_tb") == "D"
    median = config["pl_fitting"] == "median"
    return median and not config["filter_zeros"] and not distance


# Fits whose work grows with the square of the width are given spectra up to this many
# eigenvalues, then the wider ones.
WIDTHS = (150, 600, math.inf)


def fitted(spectra: Any, factors: np.ndarray, options: Any) -> list[dict[str, Any]]:
    """The columns of a table under each row of factors, all of them fitted together."""
    layers = np.tile(np.arange(len(spectra.count)), len(factors))
    spectra = jax.tree.map(lambda column: column[layers], spectra)
    spectra = spectra._replace(factor=factors.ravel())
    widths = WIDTHS if getattr(options.fit, "whole_spectrum", False) else WIDTHS[-1:]
    group = np.searchsorted(widths, spectra.count)
    parts, order = [], []
    for number in np.unique(group):
        rows = np.flatnonzero(group == number)
        part = jax.tree.map(lambda column, rows=rows: column[rows], spectra)
        width = part.count.max()
        part = part._replace(
            log_eigenvalues=part.log_eigenvalues[:, -width:],
            weights=part.weights[:, -width:],
        )
        parts.append(pipeline.measured(part, options))
        order += rows.tolist()
    columns = jax.tree.map(lambda *own: jnp.concatenate(own)[np.argsort(order)], *parts)
    return [
        {name: column.reshape(len(factors), -1)[i] for name, column in columns.items()}
        for i in range(len(factors))
    ]


def analyze_together(
    nets: Mapping[str, golden.Net],
    configs: Sequence[Mapping[str, Any]],
    precision_name: str,
) -> list[dict[str, tb_optax.Analysis]]:
    """For each configuration the table of each net, with one program for each route.

    Put together from the parts of the library's pipeline, since the spectra are the
    same for all configurations of a route; that `layer_analysis` is these parts in a
    row is for other tests.

    The nets are branches of one tree, so that matrices of equal size are decomposed
    together.
    """
    layers = {name: net.layers(golden.own_layers(net)) for name, net in nets.items()}
    flat = tuple(
        dataclasses.replace(layer, path=f"{name}/{layer.path}", follows=())
        for name, some in layers.items()
        for layer in some
    )
    analyses = [
        tb_optax.layer_analysis(
            flat,
            fit=fit_of(config),
            min_eigenvalues=0,
            eigenvalue_floor=golden.floor_of(config),
            conv_norm=config["conv_norm"],
            metric=METRICS[config.get("esd_metric_for_tb", "alpha")],
        )
        for config in configs
    ]
    pooled = np.asarray([bool(layer.axes.pooled) for layer in flat])
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, analysis in enumerate(analyses):
        options = dataclasses.replace(analysis.options, conv_norm=1)
        kinds.setdefault((pipeline.route_of(options), options), []).append(i)

    @functools.partial(jax.jit, static_argnums=1)
    def run(kernels, route):
        """Configurations of one route: the spectra once, fits and metrics of each."""
        spectra = pipeline.layer_spectra(kernels, flat, 1.0, route)
        tables = {}
        for (own, options), rows in kinds.items():
            if own is not route:
                continue
            norms = np.asarray([[configs[i]["conv_norm"]] for i in rows])
            factors = np.where(pooled, norms, 1).astype(spectra.factor.dtype)
            for i, columns in zip(rows, fitted(spectra, factors, options), strict=True):
                table = pipeline.untuned_table(flat, columns)
                tables[i] = pipeline.assigned_table(table, options)
        return tables

    results: dict[int, tb_optax.Analysis] = {}
    with precision(precision_name):
        trees = {name: net.tree(precision_name) for name, net in nets.items()}
        _, kernels, _ = analyses[0].resolve(jax.tree.map(jnp.asarray, trees))
        for route in dict.fromkeys(route for route, _ in kinds):
            results |= jax.device_get(run(kernels, route))
    ends = np.cumsum([0, *map(len, layers.values())])
    return [
        {
            name: rows_of(results[i], own, slice(start, stop))
            for (name, own), start, stop in zip(
                layers.items(), ends[:-1], ends[1:], strict=True
            )
        }
        for i in range(len(configs))
    ]


@functools.cache
def analyses(precision_name: str) -> list[dict[str, tb_optax.Analysis]]:
    """All metric configurations on all nets, the degenerate ones by "edge/<name>".

    Behind them the one that balances D, which takes another route to the eigenvalues.
    Together in one tree: what is wrong with one kernel must not reach another.
    """
    nets = {name: golden.net(name) for name in golden.NETS + golden.TRAINED}
    edge = golden.edge_cases().items()
    nets |= {f"edge/{name}": net for name, net in edge if net.layer_names}
    configs = golden.shared()["metric_configs"]
    by_distance = configs[0] | {"esd_metric_for_tb": "D"}
    return analyze_together(nets, [*configs, by_distance], precision_name)


def tables_of(
    config: Mapping[str, Any], precision_name: str
) -> dict[str, tb_optax.Analysis]:
    """What `analyses` holds for a rate configuration."""
    row = golden.metric_row(config)
    by_distance = config["esd_metric_for_tb"] == "D"
    assert row == 0 or not by_distance
    return analyses(precision_name)[-1 if by_distance else row]


# The options of a rate configuration that decide who follows whom.
structure_of = operator.itemgetter(
    *("remove_first_layer", "remove_last_layer"),
    *("batchnorm", "batchnorm_type", "layernorm"),
)


def selected_layers(
    net: golden.Net, config: Mapping[str, Any], names: Sequence[str] | None = None
) -> tuple[list[tb_optax.Layer], slice]:
    """The layers that a configuration keeps, and where they are among all."""
    names = net.layer_names if names is None else names
    first = int(config["remove_first_layer"])
    kept = slice(first, max(first, len(names) - int(config["remove_last_layer"])))
    return net.layers(names, net.norms(config))[kept], kept


def scores_of(analysis: tb_optax.Analysis, config: Mapping[str, Any]) -> np.ndarray:
    """The metric that a configuration balances."""
    metric = METRICS[config["esd_metric_for_tb"]]
    return getattr(analysis, metric) if isinstance(metric, str) else metric(analysis)


def mapped(
    config: Mapping[str, Any], scores: np.ndarray, tuned: np.ndarray, dtype: Any
) -> np.ndarray:
    """What the map of a configuration makes of the scores of tuned layers."""
    count, rows = len(scores), 64  # Of one size, so that nothing recompiles.
    inside = np.ones(rows, dtype)
    inside[:count] = np.where(tuned, scores, 1)
    acting = np.arange(rows) < count
    acting[:count] = tuned
    found = map_of(config)(jnp.asarray(inside), jnp.asarray(acting))
    return np.asarray(found)[:count]


def balance(
    analysis: tb_optax.Analysis, config: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers of an analysis under another map, metric and threshold.

    What `layer_analysis` does with its table, so that one analysis serves all maps;
    `test_golden_rates` compares whole analyses with it.

    Returns:
        The multipliers, and which layers are tuned.
    """
    scores = scores_of(analysis, config)
    enough = analysis.eigenvalue_count >= config["eigs_thresh"]
    tuned = analysis.fitted & enough & np.isfinite(scores)
    multipliers = mapped(config, scores, tuned, analysis.alpha.dtype)
    tuned = tuned & np.isfinite(multipliers)
    return np.where(tuned, multipliers, 1), tuned


def leaf_owners(
    lists: Sequence[Sequence[tb_optax.Layer]], net: golden.Net
) -> list[np.ndarray]:
    """The layer whose multiplier the library gives each parameter, for lists of layers.

    Whole leaves follow one layer here. The multipliers 2, 3, ... tell them; where the
    library gives 1, the position is -1.
    """

    @jax.jit
    def run():
        found = []
        for layers in lists:
            columns = dict.fromkeys(pipeline.COLUMNS, jnp.arange(2.0, 2 + len(layers)))
            table = tb_optax.Analysis(layers=tuple(layers), **columns)
            found.append(table.leaf_multipliers(net.params))
        return found

    columns = [[tree[name].item() for name in net.param_names] for tree in run()]
    positions = np.asarray(columns).reshape(len(lists), -1).astype(int) - 2
    return [np.where(row >= 0, row, -1) for row in positions]


def expected_multipliers(
    scores: np.ndarray, tuned: np.ndarray, config: Mapping[str, Any]
) -> np.ndarray:
    """Multipliers of the layers by the formulas in float64."""
    multipliers = np.ones(len(scores))
    multipliers[tuned] = reference.multipliers(
        np.asarray(scores, np.float64)[tuned],
        config["assign_func"],
        config["lr_min_ratio"],
        config["lr_max_ratio"],
    )
    return multipliers


def expected_leaf_values(
    layers: Sequence[tb_optax.Layer], multipliers: np.ndarray, net: golden.Net
) -> np.ndarray:
    """Multipliers of all parameters, (..., parameters), by plain bookkeeping."""
    position = {
        name: i
        for i, layer in enumerate(layers)
        for name in (layer.path, *layer.follows)
    }
    owners = np.asarray([position.get(name, -1) for name in net.param_names], int)
    return leaf_values(multipliers, owners)


def leaf_values(multipliers: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Multipliers of parameters, (..., parameters); 1 where the owner is -1."""
    padded = np.concatenate([multipliers, np.ones((*multipliers.shape[:-1], 1))], -1)
    return padded[..., owners]
