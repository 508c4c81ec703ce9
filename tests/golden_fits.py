"""Fits of the recorded nets in float64, and where float32 may choose otherwise."""

import functools

import golden
import numpy as np
import reference

CONFIGS = golden.shared()["metric_configs"]

# Two tails whose float64 distances are this close are a tie: rounding may choose
# either, and either is accepted.
TIE = {"float32": 2e-5, "x64": 1e-12}
# The layer-fits with such a tie, under every configuration of that fit.
CLOSE_FITS = {
    "float32": {
        ("custom_heavy", "block.conv1", "goodness-of-fit"),
        ("custom_heavy", "block.conv1", "fix-finger"),
        ("resnet18_w0.25_init", "layer4.0.shortcut.0", "goodness-of-fit"),
        ("wrn10x1_init", "layer2.0.shortcut.0", "goodness-of-fit"),
        ("checkpoint/resnet32", "layer2.4.conv1", "goodness-of-fit"),
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
    """Return the float64 eigenvalues of a layer."""
    return reference.spectrum(golden.net(name).kernel(layer), conv_norm)


def spectrum(name: str, layer: str, row: int) -> np.ndarray:
    """Return the float64 eigenvalues that a fit is given."""
    config = CONFIGS[row]
    eigenvalues = eigenvalues_of(name, layer, config["conv_norm"])
    return reference.above_floor(eigenvalues, golden.floor_of(config))


@functools.cache
def candidates(name: str, layer: str, row: int) -> reference.Candidates:
    """Return the candidate tails of a layer, those of the peak fit in its window."""
    eigenvalues = spectrum(name, layer, row)
    peak = CONFIGS[row]["pl_fitting"] == "fix-finger"
    window = reference.peak_window(eigenvalues) if peak else None
    return reference.candidates(eigenvalues, window)


def ties(name: str, layer: str, row: int, precision_name: str) -> np.ndarray:
    """Return the positions of the tails whose distance ties with the smallest."""
    distance = candidates(name, layer, row).ks_distance
    return np.flatnonzero(distance <= distance.min() + TIE[precision_name])


@functools.cache
def fit(name: str, layer: str, row: int) -> reference.Fit:
    """Return the fit of a layer."""
    eigenvalues = spectrum(name, layer, row)
    if CONFIGS[row]["pl_fitting"] == "median":
        return reference.fit_median(eigenvalues, CONFIGS[row]["xmin_pos"])
    return reference.best_of(eigenvalues, candidates(name, layer, row))


def fit_with_tail(
    name: str, layer: str, row: int, precision_name: str, tail_size: int
) -> reference.Fit:
    """Return the fit of a layer, or that of a tied tail if this has the tail size."""
    close = (name, layer, CONFIGS[row]["pl_fitting"])
    eigenvalues = spectrum(name, layer, row)
    first = len(eigenvalues) - tail_size
    tied = close in CLOSE_FITS[precision_name]
    if not tied or first not in ties(name, layer, row, precision_name):
        return fit(name, layer, row)
    tried = candidates(name, layer, row)
    return reference.Fit(
        float(tried.alpha[first]),
        float(tried.ks_distance[first]),
        float(eigenvalues[first]),
        tail_size,
    )
