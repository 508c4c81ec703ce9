"""Ways from kernels to the alpha of each layer: this library's, and the published one.

Each is a function without arguments that returns when its work is done.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import tb_optax
from benchmarks import timing
from benchmarks.commandline import say
from benchmarks.errors import UserError
from benchmarks.networks import Network

Params = Mapping[str, Array]
Alphas = Callable[[], np.ndarray]

OURS = "tb_optax"
QUADRATURE = "tb_optax, quadrature"
TORCH = "torch.linalg.svdvals"

_CONV_NORM = 0.5


def torch_on_same_device() -> tuple[Any, str]:
    """Return PyTorch and its name of the device that JAX uses, or raise `UserError`."""
    import torch  # An extra of its own.

    if jax.default_backend() == "cpu":
        return torch, "cpu"
    if not torch.cuda.is_available():
        which = f"PyTorch {torch.__version__}"
        raise UserError(f"{which} does not see the device that JAX uses")
    return torch, "cuda"


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


def ways(network: Network) -> dict[str, Callable[[Network, Params], Alphas]]:
    """Return the ways of a network by title; quadrature if a kernel is large enough."""
    found: dict[str, Any] = {OURS: tb_optax_way, TORCH: torch_way}
    estimate = tb_optax.quadrature()
    if max(min(shape[-2:]) for shape in network.shapes.values()) > estimate.above:
        found[QUADRATURE] = functools.partial(tb_optax_way, spectrum=estimate)
    return found


def compare(network: Network, repeats: int, budget: float) -> dict[str, Any]:
    """Time all ways of a network in turn; leave out those that cannot run here."""
    params = network.params()
    calls, alphas, missing = {}, {}, {}
    for title, way in ways(network).items():
        try:
            run = way(network, params)
        except (ModuleNotFoundError, UserError) as error:
            missing[title] = str(error)
            say(f"{network.title}: without {title}: {error}")
        else:
            # Keep what the last call returns.
            calls[title] = lambda t=title, run=run: alphas.update({t: run()})

    def rest(_: str) -> None:
        """Wait until the threads of the library before no longer spin."""
        time.sleep(0.2 if jax.default_backend() == "cpu" else 0)

    seconds = timing.interleave(calls, repeats, before=rest, budget=budget)
    difference = {
        title: float(np.max(np.abs(found / alphas[OURS] - 1)))
        for title, found in alphas.items()
    }
    return {"seconds": seconds, "alpha_difference": difference, "missing": missing}
