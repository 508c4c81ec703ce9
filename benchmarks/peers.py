"""Ways from kernels to the alpha of each layer, and from Gram matrices to eigenvalues.

Each way is a function without arguments that returns when its work is done. Where two
LAPACK calls of one JAX program could run at once, the second waits for a number of the
first: on CPU each waits in a thread of a pool that its own parts need.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import tb_optax
from benchmarks.machine import torch_on_same_device
from benchmarks.networks import Network
from tb_optax.eigenvalues import tridiagonal_eigenvalues
from tb_optax.reduction import HOUSEHOLDER, after, reduce_matrices

Params = Mapping[str, Array]
Alphas = Callable[[], np.ndarray]

OURS = "tb_optax"
TORCH = "torch.linalg.svdvals"

_CONV_NORM = 0.5


def tb_optax_way(network: Network, params: Params) -> Alphas:
    """Return the analysis of this library, multipliers included."""
    analyze = tb_optax.layer_analysis(network.layers)
    return lambda: np.asarray(jax.block_until_ready(analyze(params)).alpha)


def svd_way(network: Network, params: Params) -> Alphas:
    """Return batched singular values by JAX, and the same fit."""
    del network
    kernels = tuple(params.values())
    return lambda: np.asarray(_alphas(kernels, _singular_values))


def eigvalsh_way(network: Network, params: Params) -> Alphas:
    """Return batched eigenvalues of Gram matrices by JAX, and the same fit."""
    del network
    kernels = tuple(params.values())
    return lambda: np.asarray(_alphas(kernels, _gram_eigenvalues))


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


WAYS: Mapping[str, Callable[[Network, Params], Alphas]] = {
    OURS: tb_optax_way,
    "jnp.linalg.svd": svd_way,
    "Gram, jnp.linalg.eigvalsh": eigvalsh_way,
    TORCH: torch_way,
}


def gram_matrices(params: Params) -> list[np.ndarray]:
    """Return the Gram matrices of all layers, stacked by size."""
    by_size: dict[int, list[np.ndarray]] = {}
    for kernel in params.values():
        matrices = np.asarray(kernel).reshape(-1, *kernel.shape[-2:])
        if matrices.shape[1] < matrices.shape[2]:
            matrices = matrices.swapaxes(1, 2)
        grams = matrices.swapaxes(1, 2) @ matrices
        by_size.setdefault(grams.shape[1], []).append(grams)
    return [np.concatenate(stack) for _, stack in sorted(by_size.items())]


@jax.jit
def reduction(grams: Sequence[Array]) -> Array:
    """Tridiagonal forms by this library, one stack after the other."""
    [forms] = reduce_matrices([[stack] for stack in grams], HOUSEHOLDER)
    return forms


@jax.jit
def bisection(forms: Array, grams: Sequence[Array]) -> Array:
    """Eigenvalues by this library from those forms; the stacks tell their sizes."""
    sizes = np.repeat([g.shape[2] for g in grams], [len(g) for g in grams])
    return tridiagonal_eigenvalues(forms, sizes)


engine = jax.jit(lambda grams: bisection(reduction(grams), grams))


def scipy_eigenvalues(grams: Sequence[np.ndarray]) -> list[np.ndarray]:
    """LAPACK's `syevd` without vectors, one matrix after the other."""
    from scipy.linalg import eigvalsh

    # Transposed they are in the order that LAPACK reads, and need no second copy.
    return [
        np.stack([eigvalsh(g.T, check_finite=False, driver="evd") for g in stack])
        for stack in grams
    ]


@functools.partial(jax.jit, static_argnums=1)
def _alphas(kernels: Sequence[Array], eigenvalues: Callable[[Array], Array]) -> Array:
    """The median fit to eigenvalues of tall matrices, equal shapes in one call."""
    stacks = [kernel.reshape(-1, *kernel.shape[-2:]) for kernel in kernels]
    stacks = [w if w.shape[1] >= w.shape[2] else w.swapaxes(1, 2) for w in stacks]
    buckets: dict[tuple[int, ...], list[int]] = {}
    for i, stack in enumerate(stacks):
        buckets.setdefault(stack.shape[1:], []).append(i)
    pools: dict[int, Array] = {}
    previous = jnp.zeros(())
    for members in buckets.values():
        batch = jnp.concatenate([stacks[i] for i in members])
        values = eigenvalues(after(previous, batch))
        previous = values[0, 0]
        ends = np.cumsum([len(stacks[i]) for i in members])
        for i, own in zip(members, jnp.split(values, ends[:-1]), strict=True):
            pools[i] = jnp.sort(own.ravel())
    counts = np.asarray([pools[i].size for i in range(len(stacks))])
    padding = counts.max() - counts
    table = jnp.stack([jnp.pad(pools[i], (int(p), 0)) for i, p in enumerate(padding)])
    valid = jnp.asarray(np.arange(counts.max()) >= padding[:, None])
    logs = jnp.log(jnp.maximum(table, jnp.finfo(table.dtype).tiny))
    return tb_optax.fit_median()(logs, valid).alpha


def _singular_values(matrices: Array) -> Array:
    return jnp.linalg.svd(matrices, compute_uv=False) ** 2


def _gram_eigenvalues(matrices: Array) -> Array:
    highest = jax.lax.Precision.HIGHEST
    return jnp.linalg.eigvalsh(
        jnp.einsum("bki,bkj->bij", matrices, matrices, precision=highest)
    )
