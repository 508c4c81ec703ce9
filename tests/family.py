"""The relatives of the published method: recorded numbers, and how to ask for them.

`data/README.md` says where the files come from.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import golden
import golden_library
import jax.numpy as jnp
import numpy as np
from golden import LINEAR

import tb_optax
from tb_optax import (
    Layer,
    linear,
    log2,
    mean_one,
    nested,
    sigmoid,
    sqrt,
    standard_sigmoid,
    step,
)
from tb_optax.analysis import Options, assign_multipliers

# Names of the fits in the records, to those that TempBalance's records have.
FITS = {
    "xmin_mid": "median",
    None: "goodness-of-fit",
    "xmin_peak": "fix-finger",
}

# Records with weights, of which all kernels are analyzed together.
NETS = (
    "alpha_decay_gqa64",
    "alpha_decay_llama56",
    "alpha_pruning",
    "lm_transformer",
    "model_balancing_distil56",
    "model_balancing_distil64_thin",
    "model_balancing_roberta64",
)
SUFFIX = {"x64": "f64", "float32": "f32"}


@functools.cache
def recorded(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """The JSON file and the arrays of a record."""
    return golden.read_json(name), golden.read_arrays(name)


@functools.cache
def net(name: str) -> golden.Net:
    """A record with weights as a net; zeros for what is no kernel."""
    info, arrays = recorded(name)
    prefix = "param_a" if name == "lm_transformer" else "param"
    kernels = {
        key.removeprefix(f"{prefix}/"): value
        for key, value in arrays.items()
        if key.startswith(f"{prefix}/")
    }
    if name == "alpha_pruning":
        info = info | {
            "layer_names": info["cases"][0]["layer_names"],
            "param_names": [*kernels],
            "param_shapes": [kernel.shape for kernel in kernels.values()],
        }
    paths, shapes = info["param_names"], info["param_shapes"]
    modules = info.get("modules", ())
    return golden.Net(
        name=name,
        layer_names=tuple(info["layer_names"]),
        param_names=tuple(paths),
        modules=modules,
        params={
            path: kernels.get(path, np.zeros(shape, np.float32))
            for path, shape in zip(paths, shapes, strict=True)
        },
        info=info | golden.norm_maps(modules),
        arrays=arrays,
    )


def has_floor(config: Mapping[str, Any]) -> bool:
    """Whether a configuration leaves zeros out."""
    return config.get("filter_zeros") in (True, "True")


def fit_key(config: Mapping[str, Any]) -> tuple[str, Any, bool]:
    """What decides about the exponents of a configuration: fit, position, floor."""
    name = config["fix_fingers"] if "fix_fingers" in config else config["pl_fitting"]
    name = FITS.get(name, name)
    position = config["xmin_pos"] if name == "median" else 2
    return name, position, has_floor(config)


@functools.cache
def tables(precision: str) -> dict[Any, dict[str, tb_optax.Analysis]]:
    """The tables of all nets for each fit that one of them asks for."""
    wanted = [{"fix_fingers": fit, "xmin_pos": 2} for fit in ("xmin_mid", "xmin_peak")]
    for name in NETS:
        info = recorded(name)[0]
        wanted += info.get("metric_configs", [])
        wanted += [info["map_defaults"] | c for c in info.get("map_configs", [])]
    keys = [*dict.fromkeys(map(fit_key, wanted))]
    configs = [
        {"pl_fitting": fit, "xmin_pos": at, "filter_zeros": floor, "conv_norm": 0.5}
        for fit, at, floor in keys
    ]
    # The last one balances D, and so takes singular values.
    configs.append(configs[0] | {"esd_metric_for_tb": "D"})
    nets = {name: net(name) for name in NETS}
    found = golden_library.analyze_together(nets, configs, precision)
    return dict(zip([*keys, "singular values"], found, strict=True))


def table_of(name: str, config: Mapping[str, Any], precision: str) -> tb_optax.Analysis:
    """The table of a net under a configuration."""
    return tables(precision)[fit_key(config)][name]


@functools.cache
def linear_layer(name: str) -> Layer:
    """A layer of this name, made once."""
    return Layer(name, LINEAR)


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

    A score that is not finite is that of a layer that is not tuned. Padding with such
    layers changes nothing, and shares compilations.
    """
    count = len(names)
    rows = [*zip(map(linear_layer, names), sizes or [1] * count, strict=True)]
    rows += [(linear_layer("padding.in.padding"), 1)] * (pad - count)
    padded = np.concatenate([scores, np.full(len(rows) - count, np.nan)])
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
        jnp.asarray(np.where(np.isfinite(padded), padded, 0), float),
        jnp.isfinite(padded),
        jnp.asarray([1] * len(rows)),
        options,
        tuple(rows),
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


def map_of_decay(config):
    """The library's map for a rule of AlphaDecay."""
    return {
        "tb_linear_map": linear(config["wd_min_ratio"], config["wd_max_ratio"]),
        "layerwise_sigmoid": nested(
            None, standard_sigmoid(config["sigmoid_alpha"]), third_part
        ),
        **BY_NAME,
    }[config["assign_func"]]


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


def balanced_layers(info: Mapping[str, Any]) -> list[Layer]:
    """All layers of blocks, each with its bias and the norms that come after it."""
    names = [name for name in info["layer_names"] if block_number(linear_layer(name))]
    follows = {name: [] for name in names}
    current = None
    for path in info["param_names"]:
        module = path.rpartition(".")[0]
        if module in follows and path.endswith(".weight"):
            current = module
        elif block_number(linear_layer(path)):
            follows[module if module in follows else current].append(path)
    return [
        Layer(f"{name}.weight", LINEAR, tuple(own)) for name, own in follows.items()
    ]


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
