"""Training steps whose optimizers differ in TempBalance only."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tb_optax
from benchmarks import loop, models
from benchmarks.compilation import temporary_bytes

CLASSES = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A model, a batch of random images of `side` x `side`, and their labels."""

    model: str
    width: float
    batch: int
    side: int
    dtype: str

    @property
    def shape(self) -> loop.Shape:
        """What the model is built from."""
        return loop.Shape(self.model, CLASSES, self.width, 3, "flax", self.dtype)

    def analyze(self) -> Callable[[Any], tb_optax.Analysis]:
        """Return the analysis: without the first and the last layer, as published."""
        model = nnx.eval_shape(lambda: self.shape.build(0))
        return tb_optax.layer_analysis(models.layers_in_order(model)[1:-1])

    def examples(self) -> tuple[jax.Array, jax.Array]:
        """Draw images and labels."""
        rng = np.random.default_rng(0)
        shape = (self.batch, self.side, self.side, 3)
        images = jnp.asarray(rng.standard_normal(shape, np.float32), self.dtype)
        return images, jnp.asarray(rng.integers(0, CLASSES, self.batch, np.int32))

    def start(self, optimizer: optax.GradientTransformation) -> loop.TrainState:
        """Return the state before the first step, in arrays of its own."""
        seed = jnp.uint32(0)
        params, stats = loop.initial(self.shape, seed)
        opt_state = optimizer.init(params)
        return loop.TrainState(seed, jnp.float32(0), params, stats, opt_state)

    def step(self, optimizer: optax.GradientTransformation) -> Any:
        """Return `(state, images, labels) -> state, scores`, jitted, which donates."""
        graph = nnx.graphdef(nnx.eval_shape(lambda: self.shape.build(0)))
        step = loop.training_step(loop.image_loss(graph), lambda *_: optimizer)
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
        for _ in range(steps):
            self.state, _ = self._step(self.state, *self._examples)
        jax.block_until_ready(self.state)

    def move_to(self, count: int) -> None:
        """Let the next call be the update of this count."""

        def ours(node: Any) -> bool:
            return isinstance(node, tb_optax.TempBalanceState)

        def moved(node: Any) -> Any:
            new = jnp.full((), count, jnp.int32)
            return node._replace(count=new) if ours(node) else node

        opt_state = jax.tree.map(moved, self.state.opt_state, is_leaf=ours)
        self.state = jax.block_until_ready(self.state._replace(opt_state=opt_state))


def optimizers(
    analyze: Callable[[Any], tb_optax.Analysis], interval: int
) -> dict[str, optax.GradientTransformation]:
    """Return SGD with momentum, without TempBalance and with each form of it."""
    sgd = optax.sgd(0.01, 0.9)
    balanced = functools.partial(tb_optax.temp_balance, sgd, analyze)
    return {
        "without": sgd,
        "interval=None": balanced(interval=None),
        "plain": balanced(interval=interval),
        "spread": balanced(interval=interval, spread=True),
    }
