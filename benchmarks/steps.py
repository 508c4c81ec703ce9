"""Training steps whose optimizers differ in TempBalance only."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tb_optax
from benchmarks import models
from benchmarks.compilation import temporary_bytes

CLASSES = 100
LEARNING_RATE = 0.01
MOMENTUM = 0.9


class StepState(NamedTuple):
    """What a step changes."""

    params: Any
    batch_stats: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A model, a batch of random images of `side` x `side`, and their labels."""

    model: str
    width: float
    batch: int
    side: int
    dtype: str

    def build(self) -> models.Model:
        """Build the model."""
        return models.build(
            self.model, num_classes=CLASSES, width=self.width, rngs=nnx.Rngs(0)
        )

    def analyze(self) -> Callable[[Any], tb_optax.Analysis]:
        """Return the analysis: without the first and the last layer, as published."""
        model = nnx.eval_shape(self.build)
        return tb_optax.layer_analysis(models.layers_in_order(model)[1:-1])

    def examples(self) -> tuple[jax.Array, jax.Array]:
        """Draw images and labels."""
        rng = np.random.default_rng(0)
        shape = (self.batch, self.side, self.side, 3)
        images = jnp.asarray(rng.standard_normal(shape, np.float32), self.dtype)
        return images, jnp.asarray(rng.integers(0, CLASSES, self.batch, np.int32))

    @functools.cached_property
    def _initial(self) -> tuple[Any, Any]:
        """Parameters and running averages."""

        @jax.jit
        def initial() -> tuple[Any, Any]:
            _, params, stats = nnx.split(self.build(), nnx.Param, nnx.BatchStat)
            return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

        return initial()

    def start(self, optimizer: optax.GradientTransformation) -> StepState:
        """Return the state before the first step, in arrays of its own."""
        params, stats = jax.tree.map(jnp.copy, self._initial)
        return StepState(params, stats, optimizer.init(params))

    def step(self, optimizer: optax.GradientTransformation) -> Any:
        """Return `(state, images, labels) -> state, loss`, jitted, which donates.

        Parameters are kept in float32 and cast to the dtype of the task.
        """
        graph = nnx.graphdef(nnx.eval_shape(self.build))

        def loss_fn(params: Any, stats: Any, images: Any, labels: Any):
            cast = jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)
            model = nnx.merge(graph, cast, stats)
            logits = model(images, train=True).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        def step(state: StepState, images: Any, labels: Any):
            gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, stats), gradients = gradient_fn(
                state.params, state.batch_stats, images, labels
            )
            params, opt_state = _updated(optimizer, gradients, state)
            return StepState(params, stats, opt_state), loss

        return jax.jit(step, donate_argnums=0)


class Runner:
    """A compiled step with its state, which each call moves on."""

    def __init__(self, task: Task, optimizer: optax.GradientTransformation):
        self.state = task.start(optimizer)
        self._examples = task.examples()
        lowered = task.step(optimizer).lower(self.state, *self._examples)
        self._step = lowered.compile()
        self.temporary_bytes = temporary_bytes(self._step)

    def __call__(self, steps: int = 1) -> None:
        """Take steps and wait for the last of them."""
        loss = None
        for _ in range(steps):
            self.state, loss = self._step(self.state, *self._examples)
        jax.block_until_ready((self.state, loss))

    def move_to(self, count: int) -> None:
        """Let the next call be the update of this count."""
        self.state = jax.block_until_ready(at_count(self.state, count))


def optimizers(
    analyze: Callable[[Any], tb_optax.Analysis], interval: int
) -> dict[str, optax.GradientTransformation]:
    """Return SGD with momentum, without TempBalance and with each form of it."""

    def balanced(**options: Any) -> optax.GradientTransformation:
        return tb_optax.temp_balance(_sgd(), analyze, **options)

    return {
        "without": _sgd(),
        "interval=None": balanced(interval=None),
        "plain": balanced(interval=interval),
        "spread": balanced(interval=interval, spread=True),
    }


def at_count(state: StepState, count: int) -> StepState:
    """Return the state as the transform sees it behind so many updates."""

    def moved(node: Any) -> Any:
        if isinstance(node, tb_optax.TempBalanceState):
            return node._replace(count=jnp.full((), count, jnp.int32))
        return node

    opt_state = jax.tree.map(
        moved,
        state.opt_state,
        is_leaf=lambda node: isinstance(node, tb_optax.TempBalanceState),
    )
    return state._replace(opt_state=opt_state)


def _sgd() -> optax.GradientTransformation:
    return optax.sgd(LEARNING_RATE, MOMENTUM)


def _updated(
    optimizer: optax.GradientTransformation, gradients: Any, state: StepState
) -> tuple[Any, Any]:
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state
