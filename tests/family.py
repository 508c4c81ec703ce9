"""The relatives of the published method: recorded numbers, and how to ask for them.

`data/README.md` says where the files come from.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import golden
import golden_library
import jax
import jax.numpy as jnp
import numpy as np
from golden import LINEAR

import tb_optax
from tb_optax import Layer, linear, log2, mean_one, nested, sigmoid, sqrt, step
from tb_optax.analysis import Options, assign_multipliers

FITS = {
    "median": tb_optax.fit_median,
    "xmin_mid": tb_optax.fit_median,
    "goodness-of-fit": lambda _: tb_optax.fit_min_ks(),
    None: lambda _: tb_optax.fit_min_ks(),
    "fix-finger": lambda _: tb_optax.fit_peak(),
    "xmin_peak": lambda _: tb_optax.fit_peak(),
}

NETS = (
    "alpha_decay_gqa64",
    "alpha_decay_llama56",
    "alpha_pruning",
    "lm_transformer",
    "model_balancing_distil56",
    "model_balancing_distil64_thin",
    "model_balancing_roberta64",
)


@functools.cache
def recorded(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """The JSON file and the arrays of a record."""
    return golden.read_json(name), golden.read_arrays(name)


@functools.cache
def kernels(name: str) -> dict[str, np.ndarray]:
    """The weight matrices of a net by layer, float64."""
    info, arrays = recorded(name)
    prefix = "param_a" if name == "lm_transformer" else "param"
    names = info["cases"][0]["layer_names"] if name == "alpha_pruning" else None
    return {
        layer: arrays[f"{prefix}/{layer}.weight"].astype(np.float64)
        for layer in names or info["layer_names"]
    }


def fit_of(config: Mapping[str, Any]) -> Any:
    """The library's fit for a configuration."""
    name = config["fix_fingers"] if "fix_fingers" in config else config["pl_fitting"]
    return FITS[name](config["xmin_pos"])


def has_floor(config: Mapping[str, Any]) -> bool:
    """Whether a configuration leaves zeros out."""
    return config.get("filter_zeros") in (True, "True")


@functools.cache
def tables(
    names: tuple[str, ...], options: tuple[tuple[Any, bool], ...], precision: str
) -> list[dict[str, tb_optax.Analysis]]:
    """The tables of all nets for each (fit, floor), decomposed together."""
    layers = tuple(Layer(f"{net}:{x}", LINEAR) for net in names for x in kernels(net))
    analyses = [
        tb_optax.layer_analysis(
            layers, fit=fit, eigenvalue_floor=1e-5 if floor else None, min_eigenvalues=0
        )
        for fit, floor in options
    ]
    dtype = golden_library.dtype_of(precision)
    tree = {
        f"{net}:{x}": w.astype(dtype) for net in names for x, w in kernels(net).items()
    }
    with golden_library.precision(precision):
        found = golden_library.run_together(analyses, tree)
    ends = np.cumsum([0, *(len(kernels(net)) for net in names)])

    def part(table, net, start, stop):
        own = tuple(Layer(x, LINEAR) for x in kernels(net))
        return jax.tree.map(lambda c: c[start:stop], table).__class__(
            layers=own,
            **{
                name: getattr(table, name)[start:stop]
                for name in table.__dataclass_fields__
                if name != "layers"
            },
        )

    pairs = [*zip(names, ends[:-1], ends[1:], strict=True)]
    return [{net: part(table, net, a, b) for net, a, b in pairs} for table in found]


def table_of(
    name: str, options: Sequence[tuple[Any, bool]], wanted: Any, precision: str
) -> tb_optax.Analysis:
    """One of the tables of a net."""
    options = tuple(dict.fromkeys(options))
    return tables(NETS, options, precision)[options.index(wanted)][name]


def multipliers(
    scores: np.ndarray,
    names: Sequence[str],
    assign: Any,
    *,
    groups: Callable[[Layer], Any] | None = None,
    sizes: Sequence[int] | None = None,
    pad: int = 0,
) -> np.ndarray:
    """What an analysis makes of the scores of these layers, under a map.

    Padding with layers that are not tuned changes nothing, and shares compilations.
    """
    count = len(names)
    rows = [*zip(names, sizes or [1] * count, strict=True)]
    rows += [("padding.in.padding", 1)] * (pad - count)
    padded = np.concatenate([scores, np.zeros(len(rows) - count)])
    options = Options(
        fit=tb_optax.fit_median(),
        metric="alpha",
        assign=assign,
        min_eigenvalues=1,
        eigenvalue_floor=None,
        conv_norm=0.5,
        groups=groups,
    )
    found, _ = assign_multipliers(
        jnp.asarray(padded),
        jnp.arange(len(rows)) < count,
        jnp.asarray([1] * len(rows)),
        options,
        tuple((Layer(name, LINEAR), size) for name, size in rows),
    )
    return np.asarray(found)[:count]


def block_number(layer: Layer) -> str | None:
    """The number of the published code: the first integer between two dots."""
    numbers = [part for part in layer.path.split(".")[1:-1] if part.isdigit()]
    return numbers[0] if numbers else None


def name_without_number(layer: Layer) -> str | None:
    """The groups of `tb_layer_groups`: equal names apart from the number."""
    parts, number = layer.path.split("."), block_number(layer)
    if number is None:
        return None
    parts.remove(number)
    return ".".join(parts)


def third_part(layer: Layer) -> str:
    """The groups of `layerwise_sigmoid`."""
    return layer.path.split(".")[2]


BY_NAME = {"tb_sqrt": sqrt(), "tb_log2": log2()}


def map_of_balancing(config, kind):
    """The library's map and groups for a rule of Model Balancing."""
    rule, unit = config["temp_balance"], config["tb_unit"]
    prefix = "wd" if kind == "wd" and rule == "tb_layer_blocks" else "lr"
    low = config[f"{prefix}_min_ratio"]
    high = low + config[f"{prefix}_slope"]
    own = sigmoid(config["sigmoid_min"], config["sigmoid_max"], config["exp_temp"])
    schedules = {"sigmoid": own, "linear_map": linear(low, high)}
    schedule = schedules.get(config["schedule_func"], step(low, high))
    groups = block_number if rule == "tb_layer_blocks" and unit == "block" else None
    assign = {
        "tb_linear_map": linear(low, high),
        "tbr": step(low, high),
        "tb_std_sigmoid": own,
        "tb_layer_groups": nested(None, linear(high, low), name_without_number),
        **BY_NAME,
    }.get(rule, schedule)
    if rule == "tb_layer_blocks" and unit == "layer":
        assign = nested(schedule, linear(low, high), block_number)
    if rule == "tb_layer_blocks" and unit == "sliding_window":
        assign = one_block(config["tb_window_idx"], config["tb_window_scale"])
    normalized = rule in ("tb_linear_map", "tb_layer_blocks") and unit in (
        "block",
        "layer",
    )
    if config["tb_lr_normalize"] == "True" and normalized:
        assign = mean_one(assign, ungrouped=True)
    return assign, groups


def one_block(number, scale):
    """A map of the user: one block at another rate."""

    def assign(metric, tuned, rows):
        del tuned
        blocks = [block_number(layer) for layer, _ in rows]
        return np.where(np.asarray(blocks) == str(number), scale, 1.0) + 0 * metric

    return seeing_layers(assign)


def seeing_layers(assign: Any) -> Any:
    """Mark a map as one that gets the layers."""
    assign.needs_layers = True
    return assign
