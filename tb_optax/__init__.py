"""TempBalance for JAX: layer-wise learning rates from the spectra of the weights.

params -> layers -> matrices -> ESD -> power law -> multipliers -> updates
"""

__version__ = "0.1.0"

from tb_optax.analysis import Analysis, esd, layer_analysis
from tb_optax.describe import describe
from tb_optax.find import find_layers
from tb_optax.lanczos import exact, quadrature
from tb_optax.layers import Layer, MatrixAxes
from tb_optax.maps import linear, log2, sqrt, step
from tb_optax.power_law import PowerLaw, fit_median, fit_min_ks, fit_peak
from tb_optax.state import (
    TempBalanceState,
    get_multipliers,
    get_state,
    log_dict,
    set_multipliers,
)
from tb_optax.trace import trace_layers
from tb_optax.transform import scale_by_temp_balance, temp_balance

__all__ = [
    "Analysis",
    "Layer",
    "MatrixAxes",
    "PowerLaw",
    "TempBalanceState",
    "describe",
    "esd",
    "exact",
    "find_layers",
    "fit_median",
    "fit_min_ks",
    "fit_peak",
    "get_multipliers",
    "get_state",
    "layer_analysis",
    "linear",
    "log2",
    "log_dict",
    "quadrature",
    "scale_by_temp_balance",
    "set_multipliers",
    "sqrt",
    "step",
    "temp_balance",
    "trace_layers",
]
