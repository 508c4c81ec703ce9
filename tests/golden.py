"""Reads the recorded numbers of the published code, and the listed deviations.

`data/README.md` says where the files come from and what they hold.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import reference

import tb_optax

DATA = pathlib.Path(__file__).parent / "data" / "golden"

CONV = tb_optax.MatrixAxes((1,), (0,), pooled=(2, 3))
LINEAR = tb_optax.MatrixAxes((1,), (0,))

NETS = tuple(
    sorted(path.stem.removeprefix("metrics_") for path in DATA.glob("metrics_*.npz"))
)
# Trained ResNets, with the rows of the metric configurations that are recorded.
CHECKPOINTS = ("resnet20", "resnet32")
CHECKPOINT_ROWS = {"median": 0, "goodness-of-fit": 3, "fix-finger": 4}
PRECISIONS = ("float32", "x64")


def read_json(name: str) -> Any:
    """Read a JSON file of the golden data."""
    return json.loads((DATA / f"{name}.json").read_text())


def read_arrays(name: str) -> dict[str, np.ndarray]:
    """Read all arrays of an npz file of the golden data."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@dataclasses.dataclass(frozen=True)
class Net:
    """A recorded network.

    Attributes:
        name: its name.
        layer_names: Conv2d and Linear modules in module order.
        param_names: parameters, in the order of the recorded rates.
        modules: name and class of every module.
        params: float32 arrays; zeros for what is no kernel.
        info: the rest of its JSON file.
        arrays: the rest of its npz file.
    """

    name: str
    layer_names: tuple[str, ...]
    param_names: tuple[str, ...]
    modules: tuple[tuple[str, str], ...]
    params: Mapping[str, np.ndarray]
    info: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def kernel(self, layer: str) -> np.ndarray:
        """Return the kernel of a layer."""
        return self.params[kernel_name(layer)]

    def tree(self, precision_name: str) -> dict[str, np.ndarray]:
        """Return the parameters in the dtype of a precision."""
        dtype = np.float64 if precision_name == "x64" else np.float32
        return {name: value.astype(dtype) for name, value in self.params.items()}

    def norms(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Say which layer each norm follows under a configuration, as published."""
        norms = {}
        if config["batchnorm"]:
            norms |= self.info[f"bn_map_{config['batchnorm_type']}"]
        if config["layernorm"]:
            norms |= self.info["ln_map"]
        return norms

    def own_layers(self) -> list[str]:
        """Name the layers with a kernel; a shared one is listed under one name."""
        return [name for name in self.layer_names if kernel_name(name) in self.params]

    def layers(self, norms: Mapping[str, str] | None = None) -> list[tb_optax.Layer]:
        """Return the layers as the library takes them."""
        names = self.own_layers()
        follow = reference.followers(names, self.param_names, dict(norms or {}))
        return [
            tb_optax.Layer(
                kernel_name(name),
                CONV if self.kernel(name).ndim == 4 else LINEAR,
                follow[name],
            )
            for name in names
        ]


def kernel_name(layer: str) -> str:
    """Return the name of a layer's kernel; a bare module has the empty name."""
    return f"{layer}.weight" if layer else "weight"


def make_net(name, info, params, arrays) -> Net:
    """Put a net together, with the norm maps where they are not recorded."""
    modules = info["modules"]
    maps = {
        "bn_map_name": reference.norm_by_name(modules),
        "bn_map_order": reference.norm_by_order(modules, "BatchNorm2d", "Conv2d"),
        "ln_map": reference.norm_by_order(modules, "LayerNorm", "Linear"),
    }
    return Net(
        name=name,
        layer_names=tuple(info["layer_names"]),
        param_names=tuple(params),
        modules=tuple(map(tuple, modules)),
        params=params,
        info=maps | info,
        arrays=arrays,
    )


@functools.cache
def shared() -> dict[str, Any]:
    """Return what all nets have in common: configurations and columns."""
    return read_json("metrics")


@functools.cache
def net(name: str) -> Net:
    """Return one of `NETS`, or "checkpoint/" and one of `CHECKPOINTS`."""
    if name.startswith("checkpoint/"):
        return _checkpoint(name)
    info, arrays = read_json(f"metrics_{name}"), read_arrays(f"metrics_{name}")
    params = {
        param: arrays.pop(f"param/{param}", np.zeros(shape, np.float32))
        for param, shape in zip(info["param_names"], info["param_shapes"], strict=True)
    }
    return make_net(name, info, params, arrays)


def _checkpoint(name: str) -> Net:
    file = f"{name.replace('/', '_')}_cifar10"
    recorded, kernels = read_json(file), read_arrays(file)
    rates = recorded["lr_tb_linear_map_bnname_thresh50_untuned0.1"]
    layers = recorded["configs"]["median/f64d"]["longname"]
    params = {param: kernels.get(param, np.zeros(1, np.float32)) for param in rates}
    kinds = dict.fromkeys((param.rpartition(".")[0] for param in params), "BatchNorm2d")
    kinds |= dict.fromkeys(layers, "Conv2d") | {"linear": "Linear"}
    columns = shared()["metric_columns"]
    metrics = np.full((len(shared()["metric_configs"]), len(layers), 6), np.nan)
    for fit, row in CHECKPOINT_ROWS.items():
        config = recorded["configs"][f"{fit}/f64d"]
        metrics[row] = np.transpose([config[column] for column in columns])
    info = {"layer_names": layers, "modules": tuple(kinds.items()), "rates": rates}
    return make_net(name, info, params, {"metrics_f64d": metrics})


def eigenvalues_of(net: Net) -> list[np.ndarray]:
    """Return the recorded float64 spectra of a net's layers, at `conv_norm` 0.5."""
    return np.split(net.arrays["eigs_f64"], net.arrays["eigs_offsets"][1:-1])


@functools.cache
def edge_cases() -> dict[str, Net]:
    """Return the degenerate nets, in the order of the recorded arrays."""
    info, arrays = read_json("edge_cases"), read_arrays("edge_cases")
    nets, values, layers, params = {}, 0, 0, 0
    for case in info["cases"]:
        tree = {}
        for param, shape in zip(case["param_names"], case["param_shapes"], strict=True):
            size = math.prod(shape)
            tree[param] = arrays["param"][values : values + size].reshape(shape)
            values += size
        rows = slice(layers, layers + len(case["layer_names"]))
        columns = slice(params, params + len(tree))
        recorded = {
            "metrics_f64": arrays["metrics_f64"][:, rows],
            "lr_f32": arrays["lr_f32"][:, columns],
        }
        nets[case["name"]] = make_net(case["name"], case, tree, recorded)
        layers, params = rows.stop, columns.stop
    return nets


def floor_of(config: Mapping[str, Any]) -> float | None:
    """Return the library's eigenvalue floor for a configuration."""
    return 1e-5 if config["filter_zeros"] else None


def metric_row(config: Mapping[str, Any]) -> int:
    """Return the metric configuration that a rate configuration builds on."""
    rows = shared()["metric_configs"]
    return next(
        row
        for row, options in enumerate(rows)
        if all(config[option] == value for option, value in options.items())
    )


def beyond(what: str, where: str, deviation: Any, tolerance: Any) -> list[str]:
    """Describe each entry of a deviation that is not within its tolerance."""
    deviation = np.asarray(deviation, np.float64)
    allowed = np.broadcast_to(tolerance, deviation.shape)
    return [
        f"{where}, {i}: {what} off by {deviation.flat[i]:.3g}, {allowed.flat[i]:.3g}"
        for i in np.flatnonzero(~(deviation <= allowed))
    ]


# --- deviations ---------------------------------------------------------------------

Place = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Deviation:
    """Where the library disagrees with the published code, and why.

    Attributes:
        what: which numbers, for example "alpha" or "rate".
        cases: names of the nets or vectors.
        configs: rows of the configurations.
        published: "raises", "nan", "inf" or "finite".
        ours: what the library does, in the words of the test.
        reason: why.
        precisions: where it is so.
    """

    what: str
    cases: tuple[str, ...]
    configs: frozenset[int]
    published: str
    ours: str
    reason: str
    precisions: tuple[str, ...] = PRECISIONS


def deviations(name: str) -> tuple[Deviation, ...]:
    """Read a table of deviations from `data`; rows of configurations are as "0-3,7"."""

    def rows(text: str) -> frozenset[int]:
        ends = [tuple(map(int, part.split("-"))) for part in text.split(",")]
        return frozenset(row for pair in ends for row in range(pair[0], pair[-1] + 1))

    table = json.loads((DATA.parent / f"deviations_{name}.json").read_text())
    return tuple(Deviation(**row | {"configs": rows(row["configs"])}) for row in table)


def state_of(values: np.ndarray, *, failed: bool) -> str:
    """Say what the published code gave."""
    if failed:
        return "raises"
    if np.isnan(values).any():
        return "nan"
    return "inf" if np.isinf(values).any() else "finite"


def assert_as_listed(
    deviations: Iterable[Deviation],
    what: str,
    precision_name: str,
    found: Mapping[Place, tuple[str, str]],
) -> None:
    """Hold what deviates to the table, in both directions.

    A place that is not listed must agree, and a listed one must deviate, as listed.

    Args:
        deviations: the table.
        what: which of its rows.
        precision_name: which of its rows.
        found: (case, configuration) to (published, ours) for all that deviates.
    """
    expected = {}
    for deviation in deviations:
        if deviation.what != what or precision_name not in deviation.precisions:
            continue
        assert deviation.configs, f"nothing is meant by {deviation}"
        for case in deviation.cases:
            for row in deviation.configs:
                assert (case, row) not in expected, f"{case}, {row} is listed twice"
                expected[case, row] = (deviation.published, deviation.ours)
    wrong = [
        f"{place}: found {found.get(place)}, listed {expected.get(place)}"
        for place in sorted(found.keys() | expected.keys())
        if found.get(place) != expected.get(place)
    ]
    assert not wrong, "\n".join(wrong[:40])


def rows_with(configs: Sequence[Mapping[str, Any]], **options: Any) -> set[int]:
    """Return the rows of the configurations with these options."""
    return {
        row
        for row, config in enumerate(configs)
        if all(config[option] == value for option, value in options.items())
    }
