"""Reads the recorded numbers of the published code.

`data/README.md` says where the files come from and what they hold.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
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
TRAINED = ("resnet20_cifar10", "resnet32_cifar10")
DTYPES = {"float32": np.float32, "x64": np.float64}
PRECISIONS = tuple(DTYPES)
FITS = ("median", "goodness-of-fit", "fix-finger")


def read_json(name: str) -> Any:
    """A JSON file of the golden data."""
    return json.loads((DATA / f"{name}.json").read_text())


def read_arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of an npz file of the golden data."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def initial_parameters(info: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """PyTorch's default initialization under a seed, bit for bit, in float32.

    Kernels and biases are uniform within 1/sqrt(inputs) of 0: 24 bits of a draw each,
    scaled with one rounding. Norms are ones and zeros. NumPy's old generator is the one
    of PyTorch.
    """
    draws = np.random.RandomState(info["seed"])
    params, bound = {}, np.float32(0)
    for param, shape in zip(info["param_names"], info["param_shapes"], strict=True):
        module, _, leaf = param.rpartition(".")
        if module not in info["layer_names"]:
            params[param] = np.full(shape, leaf == "weight", np.float32)
            continue
        if leaf == "weight":
            bound = np.float32(1 / math.sqrt(math.prod(shape[1:])))
        bits = draws.randint(2**32, size=shape, dtype=np.uint32) % 2**24
        params[param] = (bits / 2**24 * (2.0 * bound) - bound).astype(np.float32)
    return params


@dataclasses.dataclass(frozen=True)
class Net:
    """A recorded network.

    Attributes:
        name: its name.
        layer_names: Conv2d and Linear modules in module order.
        param_names: parameters, in the order of `lr`.
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
        """The kernel of a layer."""
        return self.params[kernel_name(layer)]

    def tree(self, precision_name: str) -> dict[str, np.ndarray]:
        """The parameters in the dtype of a precision."""
        dtype = DTYPES[precision_name]
        return {name: value.astype(dtype) for name, value in self.params.items()}

    def norms(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Which layer each norm follows under a configuration, as published."""
        norms = {}
        if config["batchnorm"]:
            by_name = config["batchnorm_type"] == "name"
            norms |= self.info["bn_map_name" if by_name else "bn_map_order"]
        if config["layernorm"]:
            norms |= self.info["ln_map"]
        return norms

    def layers(
        self, names: Sequence[str] | None = None, norms: Mapping[str, str] | None = None
    ) -> list[tb_optax.Layer]:
        """Layers as the library takes them."""
        names = self.layer_names if names is None else names
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
    """Name of a layer's kernel; a bare module has the empty name."""
    return f"{layer}.weight" if layer else "weight"


@functools.cache
def shared() -> dict[str, Any]:
    """What all nets have in common: configurations and columns."""
    return read_json("metrics")


def metric_configs(name: str) -> list[dict[str, Any]]:
    """The metric configurations that a net is recorded under."""
    configs = shared()["metric_configs"]
    if name in TRAINED:
        return [configs[0] | {"pl_fitting": kind} for kind in FITS]
    return configs


@functools.cache
def net(name: str) -> Net:
    """One of `NETS` or `TRAINED`."""
    if name in TRAINED:
        return _trained(name)
    info, arrays = read_json(f"metrics_{name}"), read_arrays(f"metrics_{name}")
    params = {
        param: arrays.pop(f"param/{param}", np.zeros(shape, np.float32))
        for param, shape in zip(info["param_names"], info["param_shapes"], strict=True)
    }
    return Net(
        name=name,
        layer_names=tuple(info["layer_names"]),
        param_names=tuple(info["param_names"]),
        modules=tuple((path, kind) for path, kind in info["modules"]),
        params=params,
        info=info,
        arrays=arrays,
    )


def _trained(name: str) -> Net:
    """A trained ResNet; its norms are zeros."""
    info, kernels = read_json(f"checkpoint_{name}"), read_arrays(f"checkpoint_{name}")
    tables = [info["configs"][f"{kind}/f64d"] for kind in FITS]
    layers = tuple(tables[0]["longname"])
    rates = info["lr_tb_linear_map_bnname_thresh50_untuned0.1"]
    columns = shared()["metric_columns"]
    params = {param: kernels.get(param, np.zeros(1, np.float32)) for param in rates}
    kinds = {
        module: "Conv2d" if module in layers else "BatchNorm2d"
        for module in dict.fromkeys(param.rpartition(".")[0] for param in params)
    }
    modules = tuple((kinds | {"linear": "Linear"}).items())
    return Net(
        name=name,
        layer_names=layers,
        param_names=tuple(params),
        modules=modules,
        params=params,
        info={"bn_map_name": reference.norm_by_name(modules)},
        arrays={
            "metrics_f64d": np.asarray([[t[c] for c in columns] for t in tables]).mT,
            "lr_f32": np.asarray([*rates.values()]),
        },
    )


def eigenvalues_of(net: Net) -> list[np.ndarray]:
    """The recorded float64 spectra of a net's layers, at `conv_norm` 0.5."""
    offsets = net.arrays["eigs_offsets"]
    return np.split(net.arrays["eigs_f64"], offsets[1:-1])


def norm_maps(modules: Sequence[Sequence[str]]) -> dict[str, dict[str, str]]:
    """Which layer each norm follows, where it is not recorded."""
    return {
        "bn_map_name": reference.norm_by_name(modules),
        "bn_map_order": reference.norm_by_order(modules, "BatchNorm2d", "Conv2d"),
        "ln_map": reference.norm_by_order(modules, "LayerNorm", "Linear"),
    }


@functools.cache
def edge_cases() -> dict[str, Net]:
    """The degenerate nets, in the order of the recorded arrays."""
    info, arrays = read_json("edge_cases"), read_arrays("edge_cases")
    nets, values, layers, params = {}, 0, 0, 0
    for case in info["cases"]:
        tree = {}
        for param, shape in zip(case["param_names"], case["param_shapes"], strict=True):
            size = math.prod(shape)
            tree[param] = arrays["param"][values : values + size].reshape(shape)
            values += size
        rows = slice(layers, layers + len(case["layer_names"]))
        columns = slice(params, params + len(case["param_names"]))
        nets[case["name"]] = Net(
            name=case["name"],
            layer_names=tuple(case["layer_names"]),
            param_names=tuple(case["param_names"]),
            modules=tuple((path, kind) for path, kind in case["modules"]),
            params=tree,
            info=case | norm_maps(case["modules"]),
            arrays={
                "metrics_f32": arrays["metrics_f32"][:, rows],
                "metrics_f64": arrays["metrics_f64"][:, rows],
                "lr_f32": arrays["lr_f32"][:, columns],
            },
        )
        layers, params = rows.stop, columns.stop
    return nets


def floor_of(config: Mapping[str, Any]) -> float | None:
    """The library's eigenvalue floor for a configuration."""
    return 1e-5 if config["filter_zeros"] else None


def own_layers(net: Net) -> list[str]:
    """Layers with a kernel of their own; a shared one is listed under one name."""
    return [name for name in net.layer_names if kernel_name(name) in net.params]


def metric_row(config: Mapping[str, Any]) -> int:
    """The metric configuration that a rate configuration builds on."""
    return next(
        row
        for row, options in enumerate(shared()["metric_configs"])
        if options.items() <= config.items()
    )
