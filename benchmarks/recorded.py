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

Arrays = Mapping[str, np.ndarray]


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
    networks = {name: _read(data, name) for name in chosen}
    every = [
        dataclasses.replace(layer, path=f"{name}/{layer.path}", follows=())
        for name, (layers, _, _) in networks.items()
        for layer in layers
    ]
    params = {name: params for name, (_, params, _) in networks.items()}
    analyze = tb_optax.layer_analysis(every, fit=function, min_eigenvalues=0)
    analysis, place, figures = jax.device_get(analyze(params)), 0, {}
    for name, (layers, params, arrays) in networks.items():
        own = slice(place, place + len(layers))
        place = own.stop
        alpha, fitted = analysis.alpha[own], analysis.fitted[own]
        published = arrays["metrics_f64d"][row][:, 0]
        # What is not fitted has alpha 0, and is listed among the deviations.
        deviation = np.where(fitted, np.abs(alpha.astype(float) / published - 1), 0)
        figure: dict[str, Any] = {
            "layers": len(layers),
            "alpha": float(deviation.max()),
        }
        if fit == "median":
            allowed = _allowed(layers, params, arrays)
            figure["alpha / allowed"] = float((deviation / allowed).max())
            own = layers, params, arrays, alpha, fitted
            figure["multiplier"] = _rate_deviation(*own)
        figures[name] = figure
    return figures


def _read(data: Path, name: str) -> tuple[list[tb_optax.Layer], Arrays, Arrays]:
    """Return the layers of a network in module order, its parameters and its figures.

    The bias and the norms of a layer follow it. What is no kernel is zeros.
    """
    info = json.loads((data / f"metrics_{name}.json").read_text(encoding="utf-8"))
    shared = json.loads((data / "metrics.json").read_text(encoding="utf-8"))
    with np.load(data / f"metrics_{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    arrays["multipliers"] = arrays["lr_f64"][0] / shared["untuned_lr"]
    params = {
        path: arrays.get(f"param/{path}", np.zeros(shape, np.float32))
        for path, shape in zip(info["param_names"], info["param_shapes"], strict=True)
    }
    layers = []
    for module in info["layer_names"]:
        norms = [norm for norm, of in info["bn_map_name"].items() if of == module]
        wanted = [f"{module}.bias"]
        wanted += [f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias")]
        axes = _CONV if params[f"{module}.weight"].ndim == 4 else _LINEAR
        follows = tuple(path for path in wanted if path in params)
        layers.append(tb_optax.Layer(f"{module}.weight", axes, follows))
    return layers, params, arrays


def _allowed(
    layers: Sequence[tb_optax.Layer], params: Arrays, arrays: Arrays
) -> np.ndarray:
    """Return what float32 allows alpha from a Gram matrix to deviate, relatively.

    1e-5 + (alpha - 1)²/alpha · eps·sqrt(n)·λ_max/xmin.
    """
    alpha, top = arrays["metrics_f64d"][0][:, [0, 3]].T
    spectra = np.split(arrays["eigs_f64"], arrays["eigs_offsets"][1:-1])
    xmin = np.asarray([np.sort(values)[len(values) // 2] for values in spectra])
    side = [min(layer.matrix_shape(params[layer.path].shape)) for layer in layers]
    noise = np.finfo(np.float32).eps * np.sqrt(side) * top / xmin
    return 1e-5 + (alpha - 1) ** 2 / alpha * noise


def _rate_deviation(
    layers: Sequence[tb_optax.Layer],
    params: Arrays,
    arrays: Arrays,
    alpha: np.ndarray,
    fitted: np.ndarray,
) -> float | None:
    """Return the largest deviation of a leaf's multiplier from the recorded one.

    None where fewer than two layers are tuned, or one of them is not fitted: the
    published code ranks the rounding noise of such a layer with the others.
    """
    tuned = arrays["metrics_f64d"][0][:, 5] >= 50
    tuned[[0, -1]] = False
    if tuned.sum() < 2 or not fitted[tuned].all():
        return None
    multipliers = tb_optax.linear(0.5, 1.5)(jnp.asarray(alpha), jnp.asarray(tuned))
    of_leaf = dict.fromkeys(params, 1.0)
    for layer, multiplier in zip(layers, multipliers, strict=True):
        # That of a layer that is not tuned is 1.
        of_leaf |= dict.fromkeys((layer.path, *layer.follows), float(multiplier))
    return float(np.abs(np.asarray([*of_leaf.values()]) - arrays["multipliers"]).max())
