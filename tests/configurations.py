"""The configurations under which every contract of the transform must hold.

Three ways to refresh, each behind four optimizers, on one small parameter tree.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import tb_optax

ANALYZE = tb_optax.layer_analysis(min_eigenvalues=4)

# Paths of the kernels of `make_params`, in the order of the tree.
KERNELS = ("Conv_0/kernel", "Dense_0/kernel", "Dense_1/kernel")


def random_kernel(seed: int, shape: tuple[int, ...], decay: float = 1.0) -> np.ndarray:
    """A random kernel whose columns shrink like n^-decay: heavier tails for more."""
    columns = np.arange(1, shape[-1] + 1) ** -decay
    return np.random.default_rng(seed).normal(size=shape) * columns


def make_params(dtype: Any = jnp.float32) -> dict[str, dict[str, jax.Array]]:
    """Three layers of 12, 6 and 6 eigenvalues, with biases and one norm."""
    params = {
        "BatchNorm_0": {"bias": np.zeros(6), "scale": np.ones(6)},
        "Conv_0": {"bias": np.zeros(6), "kernel": random_kernel(0, (1, 2, 6, 6), 0.5)},
        "Dense_0": {"bias": np.zeros(6), "kernel": random_kernel(1, (8, 6), 1.5)},
        "Dense_1": {"kernel": random_kernel(2, (6, 7), 0.2)},
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def gradient(params: Any) -> Any:
    """A gradient that depends on the parameters, bounded and nowhere small."""
    return jax.tree.map(lambda leaf: jnp.cos(5 * leaf) + 1.5, params)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One row of the table.

    Attributes:
        name: name of the row.
        optimizer: makes the optimizer that TempBalance follows, by default or from
            a learning rate.
        interval: as in `scale_by_temp_balance`.
        every: steps between two refreshes, whoever makes them.
    """

    name: str
    optimizer: Callable[..., optax.GradientTransformation]
    interval: int | None
    every: int

    def transform(
        self, analyze: Any = ANALYZE
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer with TempBalance behind it."""
        return tb_optax.temp_balance(self.optimizer(), analyze, interval=self.interval)

    def refresh_by_host(self, params: Any, state: Any, step: int) -> Any:
        """What the host does to the state before a step."""
        if self.interval is None and step % self.every == 0:
            return tb_optax.set_multipliers(state, ANALYZE(params))
        return state


OPTIMIZERS = {
    "sgd": lambda rate=0.05: optax.sgd(rate, momentum=0.9),
    "adamw": lambda rate=0.05: optax.adamw(rate, weight_decay=0.1),
    "lion": lambda rate=0.05: optax.lion(rate),
    "muon": lambda rate=0.05: optax.contrib.muon(rate, ns_steps=1),
}
REFRESHES = {"every_1": (1, 1), "every_3": (3, 3), "by_host": (None, 3)}

EVERY_OPTIMIZER = tuple(
    Configuration(f"{name}-{refresh}", optimizer, interval, every)
    for name, optimizer in OPTIMIZERS.items()
    for refresh, (interval, every) in REFRESHES.items()
)
# Where optimizers are not under test: every refresh after one, every other optimizer
# with one refresh.
CONFIGURATIONS = (*EVERY_OPTIMIZER[:3], EVERY_OPTIMIZER[4], *EVERY_OPTIMIZER[8:10])


def make_step(transform: optax.GradientTransformation) -> Callable[..., Any]:
    """One step of training, `(params, state) -> (params, state)`, not jitted."""

    def step(params, state):
        updates, state = transform.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def jitted_step(configuration: Configuration) -> Callable[..., Any]:
    """The jitted step of a configuration, shared by the tests to compile once."""
    return jax.jit(make_step(configuration.transform()))


def train(
    configuration: Configuration,
    params: Any,
    state: Any,
    steps: range,
    step: Any = None,
) -> tuple[Any, Any]:
    """Steps of training, with the host's refreshes where the row asks for them."""
    step = step or jitted_step(configuration)
    for i in steps:
        state = configuration.refresh_by_host(params, state, i)
        params, state = step(params, state)
    return params, state


def assert_equal(actual: Any, expected: Any) -> None:
    """Asserts that two trees are the same to the bit, types included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert jnp.result_type(one) == jnp.result_type(other)
        np.testing.assert_array_equal(one, other)


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Asserts that two trees agree up to `rtol` of the largest number of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert jnp.result_type(one) == jnp.result_type(other)
        one, other = np.asarray(one, float), np.asarray(other, float)
        atol = rtol * np.max(np.abs(other), initial=0)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def assert_same_types(actual: Any, expected: Any) -> None:
    """Asserts that two trees have the same structure, shapes, dtypes, weak types."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert types_of(actual) == types_of(expected)


def types_of(tree: Any) -> Any:
    """Shape, dtype and weak type of every leaf."""
    return jax.tree.map(
        lambda leaf: (
            jnp.shape(leaf),
            jnp.result_type(leaf),
            jax.typeof(leaf).weak_type,
        ),
        tree,
    )
