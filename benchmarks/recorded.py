"""Networks that were recorded under the published code, to compare figures with.

`tests/data/README.md` says where the files come from and what they hold. The tests
compare all configurations; here it is the default one, for a machine without pytest.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tb_optax
from benchmarks.errors import UserError

_CONV = tb_optax.MatrixAxes((1,), (0,), pooled=(2, 3))
_LINEAR = tb_optax.MatrixAxes((1,), (0,))


# Fits by name, with the row of the recorded configurations that they belong to.
FITS = {
    "median": (tb_optax.fit_median(), 0),
    "min_ks": (tb_optax.fit_min_ks(), 3),
    "peak": (tb_optax.fit_peak(), 4),
}


def names(data: Path) -> list[str]:
    """Return the names of the recorded networks, the smallest file first."""
    files = sorted(data.glob("metrics_*.npz"), key=lambda path: path.stat().st_size)
    if not files:
        raise UserError(f"{data} holds no recorded network (metrics_*.npz)")
    return [path.stem.removeprefix("metrics_") for path in files]


def compare(data: Path, chosen: Sequence[str], fit: str) -> dict[str, dict[str, Any]]:
    """Analyze recorded networks, all in one program, and return their deviations.

    Rates are those of the published configuration: a linear map from 0.5 to 1.5 without
    the first and the last layer and those with fewer than 50 eigenvalues; each norm
    with the convolution of its name. A network in which fewer than two layers are
    tuned has no rates to compare: the published code gives 1.5 there, this library 1.

    Returns:
        For each network: the largest relative deviation of an alpha from the float64
        figures; for the median fit also the largest share of what rounding in float32
        allows, and the largest deviation of a multiplier.
    """
    function, row = FITS[fit]
    networks = {name: _Recorded.read(data, name) for name in chosen}
    layers = [
        dataclasses.replace(layer, path=f"{name}/{layer.path}", follows=())
        for name, network in networks.items()
        for layer in network.layers
    ]
    params = {name: network.params for name, network in networks.items()}
    analyze = tb_optax.layer_analysis(layers, fit=function, min_eigenvalues=0)
    analysis = jax.device_get(analyze(params))
    ends = np.cumsum([len(network.layers) for network in networks.values()])
    figures = {}
    for (name, network), end in zip(networks.items(), ends, strict=True):
        own = slice(end - len(network.layers), end)
        found = analysis.alpha[own].astype(np.float64)
        deviation = np.abs(found / network.arrays["metrics_f64d"][row][:, 0] - 1)
        # What is not fitted has alpha 0, and is listed among the deviations.
        deviation = np.where(analysis.fitted[own], deviation, 0)
        figure: dict[str, Any] = {"layers": len(deviation)}
        figure["alpha"] = float(deviation.max())
        if fit == "median":
            figure["alpha / allowed"] = float((deviation / network.allowed()).max())
            figure["multiplier"] = network.rate_deviation(
                analysis.alpha[own], analysis.fitted[own]
            )
        figures[name] = figure
    return figures


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """One recorded network.

    Attributes:
        layers: its layers, in module order, with their followers.
        params: its parameters; zeros for what is no kernel.
        paths: their paths, in the order of the recorded rates.
        arrays: the recorded figures.
        rate: the recorded rate of what is not tuned.
    """

    layers: list[tb_optax.Layer]
    params: dict[str, np.ndarray]
    paths: list[str]
    arrays: dict[str, np.ndarray]
    rate: float

    @classmethod
    def read(cls, data: Path, name: str) -> "_Recorded":
        info = json.loads((data / f"metrics_{name}.json").read_text(encoding="utf-8"))
        shared = json.loads((data / "metrics.json").read_text(encoding="utf-8"))
        with np.load(data / f"metrics_{name}.npz", allow_pickle=False) as file:
            arrays = dict(file)
        paths = info["param_names"]
        params = {
            path: arrays.get(f"param/{path}", np.zeros(shape, np.float32))
            for path, shape in zip(paths, info["param_shapes"], strict=True)
        }
        layers = _layers(info, params)
        return cls(layers, params, paths, arrays, shared["untuned_lr"])

    def allowed(self) -> np.ndarray:
        """What float32 allows alpha from a Gram matrix to deviate, relatively.

        1e-5 + (alpha - 1)²/alpha · eps·sqrt(n)·λ_max/xmin.
        """
        published = self.arrays["metrics_f64d"][0]
        alpha, top = published[:, 0], published[:, 3]
        offsets = self.arrays["eigs_offsets"][1:-1]
        spectra = np.split(self.arrays["eigs_f64"], offsets)
        xmin = np.asarray([np.sort(values)[len(values) // 2] for values in spectra])
        shapes = [self.params[layer.path].shape for layer in self.layers]
        side = [
            min(x.matrix_shape(s)) for x, s in zip(self.layers, shapes, strict=True)
        ]
        noise = np.finfo(np.float32).eps * np.sqrt(side) * top / xmin
        return 1e-5 + (alpha - 1) ** 2 / alpha * noise

    def rate_deviation(self, alpha: np.ndarray, fitted: np.ndarray) -> float | None:
        """Largest deviation of a leaf's multiplier from the recorded one.

        None where fewer than two layers are tuned, or one of them is not fitted: the
        published code ranks the rounding noise of such a layer with the others.
        """
        counts = self.arrays["metrics_f64d"][0][:, 5]
        tuned = (counts >= 50) & (np.arange(len(counts)) % (len(counts) - 1) > 0)
        if tuned.sum() < 2 or not fitted[tuned].all():
            return None
        multipliers = np.asarray(
            tb_optax.linear(0.5, 1.5)(jnp.asarray(alpha), jnp.asarray(tuned))
        )
        of_leaf = dict.fromkeys(self.paths, 1.0)
        for i in np.flatnonzero(tuned):
            leaves = (self.layers[i].path, *self.layers[i].follows)
            of_leaf |= dict.fromkeys(leaves, float(multipliers[i]))
        recorded = self.arrays["lr_f64"][0] / self.rate
        return float(np.abs(np.asarray([*of_leaf.values()]) - recorded).max())


def _layers(info: Mapping[str, Any], params: Mapping[str, Any]) -> list[tb_optax.Layer]:
    """The layers in module order, with the bias and the norms that follow each."""
    layers = []
    for module in info["layer_names"]:
        norms = [norm for norm, of in info["bn_map_name"].items() if of == module]
        wanted = [f"{module}.bias"]
        wanted += [f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias")]
        kernel = f"{module}.weight"
        axes = _CONV if params[kernel].ndim == 4 else _LINEAR
        follows = tuple(path for path in wanted if path in params)
        layers.append(tb_optax.Layer(kernel, axes, follows))
    return layers
