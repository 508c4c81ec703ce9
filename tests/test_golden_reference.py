"""The reference of the other golden tests gives the recorded numbers itself.

Without the library: spectra, fits, metrics and followers in NumPy float64.
"""

import golden
import golden_fits
import numpy as np
import pytest
import reference

every_net = pytest.mark.parametrize("name", golden.NETS)


@every_net
def test_metrics_and_spectra(name):
    net = golden.net(name)
    for column, (layer, eigenvalues) in enumerate(
        zip(net.layer_names, golden.eigenvalues_of(net), strict=True)
    ):
        own = reference.spectrum(net.kernel(layer))
        np.testing.assert_allclose(own, eigenvalues, rtol=0, atol=1e-14 * own[-1])
        for row, config in enumerate(golden_fits.CONFIGS):
            fit = golden_fits.fit(name, layer, row)
            own = golden_fits.eigenvalues_of(name, layer, config["conv_norm"])
            hat = fit.alpha * np.log10(own[-1])
            metrics = [fit.alpha, hat, fit.ks_distance, own[-1], own.sum(), len(own)]
            recorded = net.arrays["metrics_f64d"][row, column]
            np.testing.assert_allclose(metrics, recorded, rtol=1e-11, err_msg=layer)


@every_net
def test_norms_follow_the_recorded_layers(name):
    net = golden.net(name)
    by_order = reference.norm_by_order(net.modules, "BatchNorm2d", "Conv2d")
    after_linear = reference.norm_by_order(net.modules, "LayerNorm", "Linear")
    assert reference.norm_by_name(net.modules) == net.info["bn_map_name"]
    assert by_order == net.info["bn_map_order"]
    assert after_linear == net.info["ln_map"]
