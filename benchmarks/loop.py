"""The compiled parts of training: a step, an epoch of steps, an evaluation, a refresh.

Seed and learning rate are part of the state, so that one compiled program serves them
all. The random numbers of an epoch depend on seed and epoch alone, so that a resumed
run draws the same ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import tb_optax
from benchmarks import models
from benchmarks.arms import Analyze, Arm, Seed
from benchmarks.configs import Config
from benchmarks.images import Dataset, Preparation


class TrainState(NamedTuple):
    """What an epoch changes or follows, and a checkpoint holds."""

    seed: Array  # shape (), dtype uint32
    rate: Array  # shape (), the learning rate that the schedule starts from
    params: Any
    batch_stats: Any
    opt_state: Any


class Scores(NamedTuple):
    """Means over the rows of an epoch or of a test set."""

    loss: Array  # shape ()
    accuracy: Array  # shape (), from 0 to 1


# From parameters, running averages, and a batch to (loss, (running averages, scores)).
LossFn = Callable[..., tuple[Array, tuple[Any, Scores]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a run of an arm calls, jitted.

    Attributes:
        layers: the layers that are analyzed, in the order of execution.
        abstract: shapes and placement of the state.
        start: `(seed, rate) -> state`, before the first step.
        train: `(states, *rows, epoch) -> [(state, scores), ...]`, for a tuple of states
            of different seeds or rates at once; consumes them.
        evaluate: `(states, *rows) -> [scores, ...]`, with running averages.
        refresh: `(state) -> state, analysis`; consumes the state, and sets the
            multipliers if the arm has some.
    """

    layers: tuple[tb_optax.Layer, ...]
    abstract: TrainState
    start: Any
    train: Any
    evaluate: Any
    refresh: Any

    def compiled(self, rows: Sequence[np.ndarray], count: int) -> "Program":
        """Compile what is timed, for `count` states at once and these training rows."""
        rows = jax.eval_shape(lambda *rows: rows, *rows)
        epoch = jax.ShapeDtypeStruct((), jnp.int32)
        states = (self.abstract,) * count
        return dataclasses.replace(
            self,
            train=self.train.lower(states, *rows, epoch).compile(),
            refresh=self.refresh.lower(self.abstract).compile(),
        )


def make_program(config: Config, arm: Arm, data: Dataset) -> Program:
    """Put together the functions of an arm; nothing is computed yet."""
    sizes = data.num_classes, config.width, data.train_images.shape[-1]
    shape = Shape(config.model, *sizes, config.init, config.compute)
    # Evaluation is in full precision, whatever the training computes in.
    plain = nnx.eval_shape(lambda: shape._replace(compute="float32").build(0))
    model = nnx.eval_shape(lambda: shape.build(0))
    layers = balanced_layers(plain, config)
    steps = len(data.train_images) // config.batch_size

    def analysis(seed: Seed) -> Analyze:
        return arm.analysis(config, layers, seed)

    def optimizer(seed: Seed, rate: Array) -> optax.GradientTransformation:
        return arm.build(config, analysis(seed), steps, seed, rate)

    def start(seed: Seed, rate: float | Array) -> TrainState:
        seed, rate = jnp.uint32(seed), jnp.float32(rate)
        params, batch_stats = initial(shape, seed)
        opt_state = optimizer(seed, rate).init(params)
        return TrainState(seed, rate, params, batch_stats, opt_state)

    def refresh(state: TrainState) -> tuple[TrainState, tb_optax.Analysis]:
        analyzed = analysis(state.seed)(state.params)
        if arm.balanced:
            opt_state = tb_optax.set_multipliers(state.opt_state, analyzed)
            state = state._replace(opt_state=opt_state)
        return state, analyzed

    step = training_step(image_loss(nnx.graphdef(model), config.smoothing), optimizer)
    train = _epoch(step, data.preparation, config.batch_size)
    static = nnx.graphdef(plain), data.preparation, config.batch_size

    def evaluate(state: TrainState, images: Array, labels: Array) -> Scores:
        # The state of the optimizer is left out: one program serves all arms.
        return _evaluate(*static, state._replace(opt_state=()), images, labels)

    return assembled(layers, start, train, evaluate, refresh)


def assembled(
    layers: tuple[tb_optax.Layer, ...],
    start: Callable[[Seed, Any], TrainState],
    train: Callable[..., tuple[TrainState, Scores]],
    evaluate: Callable[..., Scores],
    refresh: Callable[[TrainState], tuple[TrainState, tb_optax.Analysis]],
) -> Program:
    """Return the program of functions of one state; `evaluate` is jitted already."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(start, 0, 0.0),
    )
    return Program(
        layers,
        abstract,
        start,
        train=jax.jit(_at_once(train), donate_argnums=0),
        evaluate=_at_once(evaluate),
        refresh=jax.jit(refresh, donate_argnums=0),
    )


def balanced_layers(model: models.Model, config: Config) -> tuple[tb_optax.Layer, ...]:
    """Return the layers to analyze: as published, without the first and the last."""
    layers = models.layers_in_order(model, norms=config.norms)
    return layers if config.ends else layers[1:-1]


def training_step(
    loss_fn: LossFn, optimizer: Callable[[Array, Array], optax.GradientTransformation]
) -> Callable[..., tuple[TrainState, Scores]]:
    """Return `(state, *batch) -> state, scores`: gradients, updates, new parameters.

    The optimizer is built from a seed and a learning rate.
    """

    def step(state: TrainState, *batch: Array) -> tuple[TrainState, Scores]:
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, (batch_stats, scores)), gradients = gradient_fn(
            state.params, state.batch_stats, *batch
        )
        updates, opt_state = optimizer(state.seed, state.rate).update(
            gradients, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        state = state._replace(
            params=params, batch_stats=batch_stats, opt_state=opt_state
        )
        return state, scores

    return step


def image_loss(graph: nnx.GraphDef, smoothing: float = 0.0) -> LossFn:
    """Return the mean cross-entropy of a model of images, in training mode."""

    def loss_fn(params: Any, batch_stats: Any, images: Array, labels: Array):
        model = nnx.merge(graph, params, batch_stats)
        logits = model(images, train=True)
        loss = cross_entropy(logits, labels, smoothing).mean()
        accuracy = jnp.mean(logits.argmax(-1) == labels)
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return loss, (stats, Scores(loss, accuracy))

    return loss_fn


class Shape(NamedTuple):
    """The arguments of `models.build` without the random numbers."""

    name: str
    num_classes: int
    width: float
    image_channels: int
    init: str
    compute: str

    def build(self, seed: Seed) -> models.Model:
        """Build the model of a seed."""
        return models.build(**self._asdict(), rngs=nnx.Rngs(keys(seed)[0]))


@functools.partial(jax.jit, static_argnums=0)
def initial(shape: Shape, seed: Array) -> tuple[Any, Any]:
    """Return parameters and running averages; compiled once for all arms and seeds."""
    _, params, stats = nnx.split(shape.build(seed), nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def keys(seed: Seed) -> Array:
    """Return the key of the initial weights, and that of row order and augmentation."""
    return jax.random.split(jax.random.key(seed))


def _at_once(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Return the function of a tuple of states, vectorized if there are several."""

    @functools.wraps(function)
    def at_once(states: tuple[TrainState, ...], *shared: Array) -> list[Any]:
        if len(states) == 1:
            return [function(states[0], *shared)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        results = jax.vmap(lambda state: function(state, *shared))(stacked)
        return [
            jax.tree.map(lambda leaf, place=place: leaf[place], results)
            for place in range(len(states))
        ]

    return at_once


def _epoch(
    step: Callable[..., tuple[TrainState, Scores]],
    preparation: Preparation,
    batch_size: int,
) -> Callable[..., tuple[TrainState, Scores]]:
    """Return one pass over the training rows; see `Program.train`."""

    def train(
        state: TrainState, images: Array, labels: Array, epoch: Array
    ) -> tuple[TrainState, Scores]:
        steps = len(images) // batch_size
        key = jax.random.fold_in(keys(state.seed)[1], epoch)
        order_key, augment_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(images))[: steps * batch_size]

        def body(state: TrainState, batch: tuple[Array, Array]):
            rows, key = batch
            return step(state, preparation.augment(key, images[rows]), labels[rows])

        batches = order.reshape(steps, batch_size), jax.random.split(augment_key, steps)
        state, scores = jax.lax.scan(body, state, batches)
        return state, jax.tree.map(jnp.mean, scores)

    return train


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _evaluate(
    graph: nnx.GraphDef,
    preparation: Preparation,
    size: int,
    state: TrainState,
    images: Array,
    labels: Array,
) -> Scores:
    """Pass over all rows; the last batch is filled up and masked.

    It is compiled once for all arms.
    """
    model, rows = nnx.merge(graph, state.params, state.batch_stats), len(images)
    order = jnp.arange(-(-rows // size) * size).reshape(-1, size)

    def body(_: None, row: Array) -> tuple[None, Scores]:
        label = labels[row % rows]
        pixels = preparation.normalize(images[row % rows])
        logits = model(pixels, train=False)
        loss = cross_entropy(logits, label)
        right = (logits.argmax(-1) == label) & (row < rows)
        return None, Scores(jnp.where(row < rows, loss, 0).sum(), right.sum())

    _, sums = jax.lax.scan(body, None, order)
    return jax.tree.map(lambda column: column.sum() / rows, sums)


def cross_entropy(logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
    """Return the loss of each label, a share of which is spread over all classes."""
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return losses
    spread = -jax.nn.log_softmax(logits).mean(-1)
    return (1 - smoothing) * losses + smoothing * spread
