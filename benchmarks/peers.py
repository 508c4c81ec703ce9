"""Ways from kernels to the alpha of each layer: this library's, and the published one.

Each is a function without arguments that returns when its work is done.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import tb_optax
from benchmarks.machine import torch_on_same_device
from benchmarks.networks import Network

Params = Mapping[str, Array]
Alphas = Callable[[], np.ndarray]
Way = Callable[[Network, Params], Alphas]

OURS = "tb_optax"
QUADRATURE = "tb_optax, quadrature"
TORCH = "torch.linalg.svdvals"

_CONV_NORM = 0.5


def tb_optax_way(network: Network, params: Params, **options: Any) -> Alphas:
    """Return the analysis of this library, multipliers included."""
    analyze = tb_optax.layer_analysis(network.layers, **options)
    return lambda: np.asarray(jax.block_until_ready(analyze(params)).alpha)


def torch_way(network: Network, params: Params) -> Alphas:
    """Return the published way: PyTorch, layer by layer, numbers read one by one.

    Of each layer the singular values of all positions at once, their squares in one
    sorted list, and the Hill estimate of its upper half with its distance.
    """
    del network
    torch, device = torch_on_same_device()
    weights = []
    for kernel in params.values():
        # PyTorch keeps outputs first: (out, in, height, width) and (out, in).
        weight = torch.from_numpy(np.array(jnp.moveaxis(kernel, (-1, -2), (0, 1))))
        weights.append(weight.to(device))

    def hill(weight) -> float:
        if weight.ndim == 4:
            matrices = torch.flatten(weight, 2).movedim(2, 0) * math.sqrt(_CONV_NORM)
        else:
            matrices = weight
        values = torch.linalg.svdvals(matrices).flatten().square().sort().values
        norms = values[-1].item(), values.sum().item()
        start = len(values) // 2
        size = len(values) - start
        tail = values[start:]
        logs = tail.log()
        alpha = 1 + size / (logs.sum() - size * logs[0])
        rank = torch.arange(size, device=values.device)
        terms = (1 - (tail / tail[0]) ** (1 - alpha) - rank / size).abs()
        return (alpha.item(), terms.max().item(), *norms)[0]

    return lambda: np.asarray([hill(weight) for weight in weights])


def ways(network: Network) -> dict[str, Way]:
    """Return the ways of a network by title; quadrature if a kernel is large enough."""
    sides = [min(shape[-2:]) for shape in network.shapes.values()]
    found: dict[str, Way] = {OURS: tb_optax_way, TORCH: torch_way}
    estimate = tb_optax.quadrature()
    if max(sides) > estimate.above:
        found[QUADRATURE] = functools.partial(tb_optax_way, spectrum=estimate)
    return found
