"""The result of an analysis: one row per layer."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tb_optax.assignment import layer_of_leaf
from tb_optax.layers import Layer
from tb_optax.leaves import leaves_of, path_of, shapes_of


@typing.no_type_check  # JAX unflattens it with tracers, shapes and placeholders.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Analysis:
    """One row per layer: what its spectrum says, and the multiplier that follows.

    λ are the eigenvalues of a layer, pooled over its matrices, scaled by
    `conv_norm` where axes are pooled. Columns in λ units may overflow to infinity
    where a kernel is huge; those in σ units do not.

    Attributes:
        layers: the layers, stacks expanded; static.
        alpha: exponent of the fitted power law; 0 where not fitted.
        alpha_hat: alpha·log10 λ_max.
        ks_distance: Kolmogorov-Smirnov distance of the fit; 0 where not fitted.
        xmin: smallest λ of the tail; 0 where not fitted.
        tail_size: number of λ in the tail; 0 where not fitted.
        eigenvalue_count: N, before any floor.
        spectral_norm: σ_max = sqrt(λ_max). (The published code's is λ_max.)
        frobenius_norm: sqrt(Σλ). (The published code's `norm` is Σλ.)
        stable_rank: Σλ / λ_max; 0 for a zero or non-finite kernel.
        multipliers: factor on the updates of the layer; 1 where not tuned.
        fitted: whether the fit can be trusted: finite kernel, not all zero, alpha
            finite and at most 1e4, xmin above the rounding noise.
        tuned: fitted, enough eigenvalues, and inside the domain of the map.
    """

    layers: tuple[Layer, ...] = dataclasses.field(metadata={"static": True})
    alpha: Float[Array, " layers"]
    alpha_hat: Float[Array, " layers"]
    ks_distance: Float[Array, " layers"]
    xmin: Float[Array, " layers"]
    tail_size: Int[Array, " layers"]
    eigenvalue_count: Int[Array, " layers"]
    spectral_norm: Float[Array, " layers"]
    frobenius_norm: Float[Array, " layers"]
    stable_rank: Float[Array, " layers"]
    multipliers: Float[Array, " layers"]
    fitted: Bool[Array, " layers"]
    tuned: Bool[Array, " layers"]

    def leaf_multipliers(self, params: Any) -> Any:
        """The multiplier of every leaf, as a tree like `params`.

        Args:
            params: the parameters, or any tree with their paths and shapes.

        Returns:
            For each array a scalar, or an array that broadcasts against it where
            slices or parts of it belong to different layers; 1 where no layer does.
        """
        by_path = leaf_multipliers(self.layers, self.multipliers, params)
        one = jnp.ones((), self.multipliers.dtype)
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: by_path.get(path_of(keys), one), params
        )

    def rows(self) -> list[dict[str, Any]]:
        """The table as plain dicts, one per layer: for pandas, csv or a logger."""
        columns = jax.device_get({name: getattr(self, name) for name in COLUMNS})
        plain = {name: column.tolist() for name, column in columns.items()}
        return [
            {"layer": layer.name} | {name: plain[name][i] for name in COLUMNS}
            for i, layer in enumerate(self.layers)
        ]


COLUMNS = tuple(f.name for f in dataclasses.fields(Analysis) if f.name != "layers")
# The columns that a map can act on.
METRICS = tuple(
    name for name in COLUMNS if name not in ("multipliers", "fitted", "tuned")
)


def leaf_multipliers(
    layers: Sequence[Layer], multipliers: Float[Array, " layers"], params: Any
) -> dict[str, Float[Array, "..."]]:
    """Multipliers of the leaves that belong to a layer, by path."""
    shapes = shapes_of(leaves_of(params))
    padded = jnp.append(multipliers, jnp.ones((), multipliers.dtype))
    owners = layer_of_leaf(layers, shapes)
    return {
        path: padded[owner if owner.size > 1 else owner.item()]
        for path, owner in owners.items()
    }
