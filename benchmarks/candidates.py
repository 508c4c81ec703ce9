"""Ways from a batch of matrices to the alpha of each, which an accelerator could take.

Every way is a jitted function from matrices (batch, rows, columns) in float32 to the
median-Hill alpha of each, (batch,), through the same fit. `WAYS` lists them, the most
promising first, so that a budget of time is spent on those.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import tb_optax
from benchmarks.peers import OURS, torch_on_same_device
from tb_optax.eigenvalues import of_both_signs, tridiagonal_eigenvalues

Way = Callable[[Array], Array]

_STACK = tb_optax.MatrixAxes((1,), (2,), stacked=(0,))


def reference_alpha(matrix: Array) -> float:
    """Return the alpha of one matrix in float64, by NumPy."""
    w = np.asarray(matrix, np.float64)
    w = w if w.shape[0] >= w.shape[1] else w.T
    values = np.linalg.eigvalsh(w.T @ w)
    logs = np.log(values[len(values) // 2 :])
    return float(1 + len(logs) / (logs - logs[0]).sum())


def _analysis(spectrum: tb_optax.exact | tb_optax.quadrature) -> Way:
    """Return the analysis of this library, a layer for each matrix."""
    analyze = tb_optax.layer_analysis(
        [tb_optax.Layer("w", _STACK)], min_eigenvalues=0, spectrum=spectrum
    )

    @jax.jit
    def alphas(w: Array) -> Array:
        # A batch of one matrix is one layer, and a map needs two of them to act.
        layers = w if len(w) > 1 else jnp.concatenate([w, w])
        return analyze({"w": layers}).alpha[: len(w)]

    return alphas


def _from_eigenvalues(eigenvalues: Callable[[Array], Array]) -> Way:
    """Return a way from matrices to ascending eigenvalues, with the fit after it."""

    @jax.jit
    def alphas(w: Array) -> Array:
        tall = w if w.shape[1] >= w.shape[2] else w.swapaxes(1, 2)
        values = eigenvalues(tall)
        logs = jnp.log(jnp.maximum(values, jnp.finfo(values.dtype).tiny))
        return tb_optax.fit_median()(logs, jnp.ones(logs.shape, bool)).alpha

    return alphas


def _from_singular_values(values: Callable[[Array], Array]) -> Way:
    """Return the same from descending singular values."""
    return _from_eigenvalues(lambda w: values(w)[:, ::-1] ** 2)


def _gram(w: Array) -> Array:
    highest = lax.Precision.HIGHEST
    return jnp.einsum("bki,bkj->bij", w, w, precision=highest)


def _tridiagonal(w: Array) -> Array:
    """Reduce one matrix after the other by JAX, and bisect."""
    _, diagonal, beside, _ = lax.map(lax.linalg.tridiagonal, _gram(w))
    return _bisect(diagonal, beside)


def _householder(w: Array) -> Array:
    """Reduce all matrices together, one reflection after the other, and bisect.

    With A symmetric and v the unit vector of the reflection that clears column k below
    its subdiagonal, A <- A - v qᵀ - q vᵀ, where p = A v and q = 2 (p - (vᵀp) v).
    """
    a = _gram(w)
    n = a.shape[-1]
    index = jnp.arange(n)

    def reflect(k, a):
        column = jnp.where(index > k, a[:, :, k], 0)
        norm = jnp.linalg.norm(column, axis=1)
        v = column.at[:, k + 1].add(jnp.where(column[:, k + 1] < 0, -norm, norm))
        length = jnp.linalg.norm(v, axis=1, keepdims=True)
        v = v / jnp.where(length > 0, length, 1)
        p = jnp.einsum("bij,bj->bi", a, v, precision=lax.Precision.HIGHEST)
        q = 2 * (p - jnp.sum(v * p, axis=1, keepdims=True) * v)
        return a - v[:, :, None] * q[:, None] - q[:, :, None] * v[:, None]

    a = lax.fori_loop(0, n - 2, reflect, a)
    diagonal = jnp.diagonal(a, axis1=1, axis2=2)
    return _bisect(diagonal, jnp.diagonal(a, offset=1, axis1=1, axis2=2))


def _bisect(diagonal: Array, beside: Array) -> Array:
    forms = jnp.stack([diagonal, jnp.pad(beside, ((0, 0), (1, 0)))], axis=1)
    count, n = diagonal.shape
    return tridiagonal_eigenvalues(forms, np.full(count, n))


def torch_way(w: Array) -> Callable[[], np.ndarray]:
    """Return PyTorch's batched singular values with the same fit, on its own copy."""
    torch, device = torch_on_same_device()
    matrices = torch.from_numpy(np.array(w)).to(device)

    def alphas() -> np.ndarray:
        values = torch.linalg.svdvals(matrices).square().sort(dim=1).values
        logs = values[:, values.shape[1] // 2 :].log()
        excess = (logs - logs[:, :1]).sum(dim=1)
        return (1 + logs.shape[1] / excess).cpu().numpy()

    return alphas


# The ways that run in JAX.
WAYS: dict[str, Way] = {
    OURS: _analysis(tb_optax.exact()),
    "Gram, eigvalsh": _from_eigenvalues(lambda w: jnp.linalg.eigvalsh(_gram(w))),
    "quadrature": _analysis(tb_optax.quadrature(above=0)),
    "Gram, eigh by Jacobi": _from_eigenvalues(
        lambda w: lax.linalg.eigh(
            _gram(w), implementation=lax.linalg.EighImplementation.JACOBI
        )[1]
    ),
    "Householder in JAX, bisection": _from_eigenvalues(_householder),
    "tridiagonal, bisection": _from_eigenvalues(_tridiagonal),
    "svd": _from_singular_values(lambda w: jnp.linalg.svd(w, compute_uv=False)),
    "svd by QR": _from_singular_values(
        lambda w: lax.linalg.svd(
            w, compute_uv=False, algorithm=lax.linalg.SvdAlgorithm.QR
        )
    ),
    "eigvalsh of both signs": _from_eigenvalues(
        lambda w: jax.vmap(of_both_signs)(w) ** 2
    ),
}
