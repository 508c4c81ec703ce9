"""The reference of the other golden tests gives the recorded numbers itself.

Without the library: spectra, fits, metrics and followers in NumPy float64.
"""

import golden
import numpy as np
import pytest
import reference


def fit(config, eigenvalues):
    kept = reference.above_floor(eigenvalues, golden.floor_of(config))
    if config["pl_fitting"] == "median":
        return reference.fit_median(kept, config["xmin_pos"])
    if config["pl_fitting"] == "goodness-of-fit":
        return reference.fit_min_ks(kept)
    return reference.fit_peak(kept)


@pytest.mark.parametrize("name", golden.NETS)
def test_metrics(name):
    net = golden.net(name)
    recorded = net.arrays["metrics_f64d"]
    for column, layer in enumerate(net.layer_names):
        spectra = {
            conv_norm: reference.spectrum(net.kernel(layer), conv_norm)
            for conv_norm in (0.5, 1.0)
        }
        for row, config in enumerate(golden.shared()["metric_configs"]):
            eigenvalues = spectra[config["conv_norm"]]
            found = fit(config, eigenvalues)
            top = eigenvalues[-1]
            metrics = [
                found.alpha,
                found.alpha * np.log10(top),
                found.ks_distance,
                top,
                eigenvalues.sum(),
                len(eigenvalues),
            ]
            np.testing.assert_allclose(
                metrics, recorded[row, column], rtol=1e-11, err_msg=f"{layer} {config}"
            )


@pytest.mark.parametrize("name", golden.NETS)
def test_spectra(name):
    net = golden.net(name)
    for layer, recorded in zip(
        net.layer_names, golden.eigenvalues_of(net), strict=True
    ):
        found = reference.spectrum(net.kernel(layer))
        np.testing.assert_allclose(found, recorded, rtol=0, atol=1e-14 * recorded[-1])


@pytest.mark.parametrize("name", golden.NETS)
def test_norms_follow_the_recorded_layers(name):
    net = golden.net(name)
    by_order = reference.norm_by_order(net.modules, "BatchNorm2d", "Conv2d")
    assert reference.norm_by_name(net.modules) == net.info["bn_map_name"]
    assert by_order == net.info["bn_map_order"]
    assert (
        reference.norm_by_order(net.modules, "LayerNorm", "Linear")
        == (net.info["ln_map"])
    )
