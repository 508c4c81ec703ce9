"""Drives the library as the published code is configured.

Spectra are computed once and shared by the test modules: compiling is what costs.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import reference

import tb_optax
from tb_optax import analysis as pipeline
from tb_optax.layers import layer_of_leaf

# Golden name of a metric, to the library's metric that ranks layers alike.
METRICS = {
    "alpha": "alpha",
    "alphahat": "alpha_hat",
    "D": "ks_distance",
    "spectral_norm": lambda analysis: analysis.spectral_norm**2,
    "norm": lambda analysis: analysis.frobenius_norm**2,
}


@contextlib.contextmanager
def configured(option: str, value: bool) -> Iterator[None]:
    """Set an option of JAX, and restore what was set."""
    before = jax.config.read(option)
    jax.config.update(option, value)
    try:
        yield
    finally:
        jax.config.update(option, before)


def precision(name: str) -> contextlib.AbstractContextManager[None]:
    """Run the library in float32 or with 64-bit types."""
    return configured("jax_enable_x64", name == "x64")


def dtype_of(precision_name: str) -> type:
    """Return the dtype of the parameters under a precision."""
    return np.float64 if precision_name == "x64" else np.float32


def fit_of(config: Mapping[str, Any]) -> Any:
    """Return the library's fit for a configuration."""
    if config["pl_fitting"] == "median":
        return tb_optax.fit_median(config["xmin_pos"])
    if config["pl_fitting"] == "goodness-of-fit":
        return tb_optax.fit_min_ks()
    return tb_optax.fit_peak()


def map_of(config: Mapping[str, Any]) -> Any:
    """Return the library's map for a configuration."""
    low, high = config["lr_min_ratio"], config["lr_max_ratio"]
    return {
        "tb_linear_map": lambda: tb_optax.linear(low, high),
        "tb_sqrt": tb_optax.sqrt,
        "tb_log2": tb_optax.log2,
        "tb_step": lambda: tb_optax.step(low, high),
    }[config["assign_func"]]()


def analysis_of(
    layers: Sequence[tb_optax.Layer], config: Mapping[str, Any]
) -> pipeline.LayerAnalysis:
    """Return the whole analysis that a rate configuration asks for."""
    return tb_optax.layer_analysis(
        layers,
        fit=fit_of(config),
        metric=METRICS[config.get("esd_metric_for_tb", "alpha")],
        assign=map_of(config),
        min_eigenvalues=config["eigs_thresh"],
        eigenvalue_floor=golden.floor_of(config),
        conv_norm=config["conv_norm"],
    )


def is_gram(config: Mapping[str, Any]) -> bool:
    """Return whether the analysis takes the route through Gram matrices."""
    distance = config.get("esd_metric_for_tb") == "D"
    median = config["pl_fitting"] == "median"
    return median and not config["filter_zeros"] and not distance


def run_together(analyses: Sequence[Any], params: Any) -> list[Any]:
    """Run several analyses in one compilation, so that what they share is done once.

    That is most of their work where layers and route are the same.

    Args:
        analyses: what `layer_analysis` returned.
        params: the parameters.
    """
    together = jax.jit(lambda params: [analyze(params) for analyze in analyses])
    return jax.device_get(together(jax.tree.map(jnp.asarray, params)))


class Compiled:
    """A fit that is compiled once for all configurations that have it."""

    def __init__(self, fit: Any):
        self.absolute = fit.absolute
        self._jitted = jax.jit(fit)

    def __call__(self, log_eigenvalues, valid):
        """Fit the rows of a table."""
        return self._jitted(log_eigenvalues, valid)


compiled = functools.cache(Compiled)


def all_nets() -> dict[str, golden.Net]:
    """Return every recorded net, the degenerate ones as "edge/<name>"."""
    names = (*golden.NETS, *(f"checkpoint/{name}" for name in golden.CHECKPOINTS))
    edge = {f"edge/{name}": net for name, net in golden.edge_cases().items()}
    nets = {name: golden.net(name) for name in names} | edge
    return {name: net for name, net in nets.items() if net.layer_names}


Table = dict[str, np.ndarray]


@functools.cache
def analyses(precision_name: str) -> list[dict[str, Table]]:
    """Return the columns of every net under every metric configuration.

    After them, under the one that balances D, which takes another route to the
    eigenvalues. All nets are branches of one tree, so that matrices of equal size are
    decomposed together: what is wrong with one kernel must not reach another. The
    library's stages are called one by one, since spectra are the same for all
    configurations of a route; `test_whole_analysis` compares `layer_analysis`.
    """
    nets = all_nets()
    flat = tuple(
        dataclasses.replace(layer, path=f"{name}/{layer.path}")
        for name, net in nets.items()
        for layer in net.layers()
    )
    pooled = np.asarray([bool(layer.axes.pooled) for layer in flat])
    configs = golden.shared()["metric_configs"]
    results = []
    with precision(precision_name):
        dtype = dtype_of(precision_name)
        kernels = {
            f"{name}/{layer.path}": jnp.asarray(net.params[layer.path], dtype)
            for name, net in nets.items()
            for layer in net.layers()
        }

        @functools.cache
        def spectra_of(route):
            decompose = jax.jit(lambda k: pipeline.layer_spectra(k, flat, 1.0, route))
            # To compile takes much longer than to run.
            with configured("jax_disable_most_optimizations", True):
                return decompose(kernels)

        for config in [*configs, configs[0] | {"esd_metric_for_tb": "D"}]:
            metric = METRICS[config.get("esd_metric_for_tb", "alpha")]
            options = tb_optax.layer_analysis(
                fit=fit_of(config),
                metric=metric,
                min_eigenvalues=0,
                eigenvalue_floor=golden.floor_of(config),
                conv_norm=config["conv_norm"],
            ).options
            spectra = spectra_of(pipeline.route_of(options))
            factor = np.where(pooled, config["conv_norm"], 1).astype(dtype)
            options = dataclasses.replace(options, fit=compiled(options.fit))
            spectra = spectra._replace(factor=factor)
            table = pipeline.fitted_table(spectra, flat, options)
            results.append(jax.device_get(pipeline.assigned_table(table, options)))
    ends = np.cumsum([0, *(len(net.layers()) for net in nets.values())])
    return [
        {
            name: {c: getattr(table, c)[start:stop] for c in pipeline.COLUMNS}
            for name, start, stop in zip(nets, ends[:-1], ends[1:], strict=True)
        }
        for table in results
    ]


def table_of(name: str, config: Mapping[str, Any], precision_name: str) -> Table:
    """Return what `analyses` holds of a net for a rate configuration."""
    row = golden.metric_row(config)
    by_distance = config["esd_metric_for_tb"] == "D"
    assert row == 0 or not by_distance
    return analyses(precision_name)[-1 if by_distance else row][name]


def selected_layers(
    net: golden.Net, config: Mapping[str, Any]
) -> tuple[list[tb_optax.Layer], slice]:
    """Return the layers that a configuration keeps, and where they are among all."""
    layers = net.layers(net.norms(config))
    first = int(config["remove_first_layer"])
    kept = slice(first, max(first, len(layers) - int(config["remove_last_layer"])))
    return layers[kept], kept


# Rows that are not fitted have no part in a map, and make tables of one size.
PADDING = (tb_optax.Layer("padding", golden.LINEAR),) * 64


def leaf_multipliers(
    nets: Mapping[str, golden.Net], config: Mapping[str, Any], precision_name: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the multipliers of all parameters of each net, in two ways.

    By the library, from the tables of `analyses`; and by the formulas in float64, from
    the scores of the same tables, with plain bookkeeping of who follows whom.
    """
    kept = {name: selected_layers(net, config) for name, net in nets.items()}
    tables = [
        {
            column: np.pad(values[rows], (0, len(PADDING) - len(layers)))
            for column, values in table_of(name, config, precision_name).items()
        }
        for name, (layers, rows) in kept.items()
    ]
    options = analysis_of((), config).options
    metric = METRICS[config["esd_metric_for_tb"]]

    def assign(columns):
        table = tb_optax.Analysis(layers=PADDING, **columns)
        scores = getattr(table, metric) if isinstance(metric, str) else metric(table)
        return scores, pipeline.assigned_table(table, options).multipliers

    with precision(precision_name):
        stacked = jax.tree.map(lambda *columns: jnp.stack(columns), *tables)
        scores, assigned = map(np.asarray, jax.vmap(assign)(stacked))
    result = {}
    for i, (name, (layers, _)) in enumerate(kept.items()):
        tuned = tables[i]["fitted"] & (
            tables[i]["eigenvalue_count"] >= config["eigs_thresh"]
        )
        expected = reference.multipliers(
            np.where(tuned, scores[i].astype(np.float64), np.nan),
            config["assign_func"],
            config["lr_min_ratio"],
            config["lr_max_ratio"],
        )
        net = nets[name]
        shapes = {path: leaf.shape for path, leaf in net.params.items()}
        owners = layer_of_leaf(layers, shapes)
        ours = [
            assigned[i, owners[path].item()] if path in owners else 1
            for path in net.params
        ]
        position = {
            path: row
            for row, layer in enumerate(layers)
            for path in (layer.path, *layer.follows)
        }
        formula = [expected[position[p]] if p in position else 1 for p in net.params]
        result[name] = (np.asarray(ours), np.asarray(formula))
    return result
