"""Fits of the nets in float64, and where float32 may choose otherwise."""

import functools

import golden
import numpy as np
import reference

EPS = float(np.finfo(np.float32).eps)

# Two tails whose float64 distances are this close are a tie: rounding may choose
# either, and the alpha of either is accepted.
TIE = {"float32": 2e-5, "x64": 1e-12}
# The layer-fits with such a tie, under every configuration of that fit.
CLOSE_FITS = {
    "float32": {
        ("custom_heavy", "block.conv1", "goodness-of-fit"),
        ("custom_heavy", "block.conv1", "fix-finger"),
        ("resnet18_w0.25_init", "layer4.0.shortcut.0", "goodness-of-fit"),
        ("wrn10x1_init", "layer2.0.shortcut.0", "goodness-of-fit"),
        ("resnet32_cifar10", "layer2.4.conv1", "goodness-of-fit"),
    },
    "x64": set(),
}

# What float32 cannot fit through Gram matrices: λ_max / xmin is beyond 1 / (8·eps), so
# that xmin is rounding noise.  The positions of the median fits that this concerns.
NOT_FITTED = {
    ("mlp6_mixed_heavy", "fc1"): {2, 3, 4},
    ("mlp6_mixed_heavy", "fc4"): {3, 4},
    ("mlp6_mixed_heavy", "fc6"): {2, 3, 4},
    ("resnet18_w0.125_heavy", "layer1.0.conv2"): {3, 4},
    ("resnet18_w0.125_heavy", "layer2.0.conv2"): {2, 3, 4},
    ("resnet18_w0.125_heavy", "layer3.0.conv1"): {2, 3, 4},
    ("resnet18_w0.125_heavy", "layer3.0.conv2"): {2, 3, 4},
    ("wrn16x1_heavy", "layer2.1.conv2"): {2, 3, 4},
}


@functools.cache
def eigenvalues_of(name: str, layer: str, conv_norm: float) -> np.ndarray:
    """All eigenvalues of a layer in float64."""
    return reference.spectrum(golden.net(name).kernel(layer), conv_norm)


def spectrum(name: str, layer: str, row: int) -> np.ndarray:
    """The eigenvalues that a fit is given."""
    config = golden.metric_configs(name)[row]
    eigenvalues = eigenvalues_of(name, layer, config["conv_norm"])
    return reference.above_floor(eigenvalues, golden.floor_of(config))


@functools.cache
def tried(name: str, layer: str, row: int) -> reference.Candidates:
    """The candidate tails of a layer, those of the peak fit in its own window."""
    eigenvalues = spectrum(name, layer, row)
    peak = golden.metric_configs(name)[row]["pl_fitting"] == "fix-finger"
    window = reference.peak_window(eigenvalues) if peak else None
    return reference.candidates(eigenvalues, window)


@functools.cache
def best_fit(name: str, layer: str, row: int) -> reference.Fit:
    """The fit of a layer."""
    eigenvalues, config = spectrum(name, layer, row), golden.metric_configs(name)[row]
    if config["pl_fitting"] == "median":
        return reference.fit_median(eigenvalues, config["xmin_pos"])
    return reference.best_of(eigenvalues, tried(name, layer, row))


def tied_alphas(name: str, layer: str, row: int, precision_name: str) -> np.ndarray:
    """The alphas of all candidates whose distance ties with the smallest."""
    candidates = tried(name, layer, row)
    limit = candidates.ks_distance.min() + TIE[precision_name]
    return candidates.alpha[candidates.ks_distance <= limit]


def accepted_alpha(
    name: str, layer: str, row: int, precision_name: str, alpha: float
) -> float:
    """The published alpha, or that of a tied tail where it is nearer to `alpha`."""
    net, kind = golden.net(name), golden.metric_configs(name)[row]["pl_fitting"]
    published = net.arrays["metrics_f64d"][row, net.layer_names.index(layer), 0]
    if (name, layer, kind) not in CLOSE_FITS[precision_name]:
        return published
    others = [published, *tied_alphas(name, layer, row, precision_name)]
    return min(others, key=lambda other: abs(alpha / other - 1))
