"""The reference of the other golden tests gives the recorded numbers itself.

Without the library: spectra, fits, metrics and followers in NumPy float64.
"""

import golden
import numpy as np
import pytest
from golden_fits import best_fit, eigenvalues_of

every_net = pytest.mark.parametrize("name", golden.NETS)


@every_net
def test_metrics(name):
    net = golden.net(name)
    for row, config in enumerate(golden.metric_configs(name)):
        for column, layer in enumerate(net.layer_names):
            eigenvalues = eigenvalues_of(name, layer, config["conv_norm"])
            fit, top = best_fit(name, layer, row), eigenvalues[-1]
            metrics = [fit.alpha, fit.alpha * np.log10(top), fit.ks_distance]
            metrics += [top, eigenvalues.sum(), len(eigenvalues)]
            recorded = net.arrays["metrics_f64d"][row, column]
            np.testing.assert_allclose(metrics, recorded, rtol=1e-11, err_msg=layer)


@every_net
def test_spectra(name):
    net = golden.net(name)
    for layer, recorded in zip(
        net.layer_names, golden.eigenvalues_of(net), strict=True
    ):
        found = eigenvalues_of(name, layer, 0.5)
        np.testing.assert_allclose(found, recorded, rtol=0, atol=1e-14 * recorded[-1])


@every_net
def test_norms_follow_the_recorded_layers(name):
    net = golden.net(name)
    for rule, followed in golden.norm_maps(net.modules).items():
        assert followed == net.info[rule]
