"""TempBalance for JAX: layer-wise learning rates from the spectra of the weights.

params -> layers -> matrices -> ESD -> power law -> multipliers -> updates
"""

__version__ = "0.2.0"

from tb_optax import recipes
from tb_optax.analysis import Analysis, esd, layer_analysis, relative_alpha
from tb_optax.describe import describe
from tb_optax.find import find_layers
from tb_optax.lanczos import exact, quadrature
from tb_optax.layers import Layer, MatrixAxes
from tb_optax.maps import (
    by_block,
    linear,
    log2,
    mean_one,
    nested,
    sigmoid,
    sqrt,
    standard_sigmoid,
    step,
)
from tb_optax.power_law import PowerLaw, fit_median, fit_min_ks, fit_peak
from tb_optax.state import (
    TempBalanceState,
    get_multipliers,
    get_state,
    log_dict,
    set_multipliers,
)
from tb_optax.submatrices import windows
from tb_optax.trace import trace_layers
from tb_optax.transform import (
    add_balanced_weight_decay,
    scale_by_temp_balance,
    temp_balance,
)

__all__ = [
    "Analysis",
    "Layer",
    "MatrixAxes",
    "PowerLaw",
    "TempBalanceState",
    "add_balanced_weight_decay",
    "by_block",
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
    "mean_one",
    "nested",
    "quadrature",
    "recipes",
    "relative_alpha",
    "scale_by_temp_balance",
    "set_multipliers",
    "sigmoid",
    "sqrt",
    "standard_sigmoid",
    "step",
    "temp_balance",
    "trace_layers",
    "windows",
]
