"""The compiled parts of training: an epoch, an evaluation, a refresh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import tb_optax
from benchmarks import models
from benchmarks.arms import Arm
from benchmarks.configs import Config
from benchmarks.controls import Analyze
from benchmarks.data import Dataset
from benchmarks.data.augment import Preparation


class TrainState(NamedTuple):
    """What an epoch changes, and a checkpoint holds."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Scores(NamedTuple):
    """Means over the rows of an epoch or of a test set."""

    loss: Array  # shape ()
    accuracy: Array  # shape (), from 0 to 1


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What an arm runs; jitted, and compiled ahead by `compiled`.

    Attributes:
        layers: the layers that are analysed, in the order of execution.
        abstract: shapes and placement of the state.
        start: `() -> state`, before the first step.
        train: `(state, images, labels, epoch) -> state, scores`; consumes the state.
        evaluate: `(state, images, labels) -> scores`, with running averages.
        refresh: `(state) -> state, analysis`; consumes the state, and sets the
            multipliers if the arm has some.
    """

    layers: tuple[tb_optax.Layer, ...]
    abstract: TrainState
    start: Any
    train: Any
    evaluate: Any
    refresh: Any

    def compiled(self, data: Dataset) -> "Program":
        """Compile for the shapes of a data set, so that no epoch is timed with it."""
        rows = _abstract(data.train_images), _abstract(data.train_labels)
        test_rows = _abstract(data.test_images), _abstract(data.test_labels)
        epoch = jax.ShapeDtypeStruct((), jnp.int32)
        return dataclasses.replace(
            self,
            train=self.train.lower(self.abstract, *rows, epoch).compile(),
            evaluate=self.evaluate.lower(self.abstract, *test_rows).compile(),
            refresh=self.refresh.lower(self.abstract).compile(),
        )


def make_program(config: Config, arm: Arm, data: Dataset) -> Program:
    """Put together the functions of an arm; nothing is computed yet."""
    init_key, order_key = jax.random.split(jax.random.key(config.seed))
    shape = _Shape(
        config.model,
        data.num_classes,
        config.width,
        data.train_images.shape[-1],
        config.init,
    )
    model = nnx.eval_shape(lambda: shape.build(init_key))
    graph = nnx.graphdef(model)
    layers = balanced_layers(model, config)
    analyze = arm.analysis(config, layers)
    steps = len(data.train_images) // config.batch_size
    optimizer = arm.build(config, analyze, steps)

    def start() -> TrainState:
        params, batch_stats = _initial(shape, init_key)
        return TrainState(params, batch_stats, optimizer.init(params))

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(start),
    )
    train = _epoch(graph, optimizer, data.preparation, config.batch_size, order_key)
    evaluate = _evaluation(graph, data.preparation, config.batch_size)
    refresh = _refresh(analyze, balanced=arm.balanced)
    return Program(
        layers,
        abstract,
        start,
        train=jax.jit(train, donate_argnums=0),
        evaluate=jax.jit(evaluate),
        refresh=jax.jit(refresh, donate_argnums=0),
    )


def balanced_layers(model: models.Model, config: Config) -> tuple[tb_optax.Layer, ...]:
    """Return the layers to analyse; as published, not the first and the last."""
    layers = models.layers_in_order(model, norms=config.norms)
    return layers if config.ends else layers[1:-1]


class _Shape(NamedTuple):
    """The arguments of `models.build` but for the random numbers."""

    name: str
    num_classes: int
    width: float
    image_channels: int
    init: str

    def build(self, key: Array) -> models.Model:
        return models.build(**self._asdict(), rngs=nnx.Rngs(key))


@functools.partial(jax.jit, static_argnums=0)
def _initial(shape: _Shape, key: Array) -> tuple[Any, Any]:
    """Return parameters and running averages; compiled once for all arms and seeds."""
    _, params, stats = nnx.split(shape.build(key), nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def _abstract(array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _epoch(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    preparation: Preparation,
    batch_size: int,
    key: Array,
) -> Callable[..., tuple[TrainState, Scores]]:
    """Return one pass over the training rows, in an order of (seed, epoch) alone."""

    def step(
        state: TrainState, images: Array, labels: Array, augment_key: Array
    ) -> tuple[TrainState, Scores]:
        inputs = preparation.augment(augment_key, images)

        def loss_fn(params: Any) -> tuple[Array, tuple[Any, Array]]:
            model = nnx.merge(graph, params, state.batch_stats)
            logits = model(inputs, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return losses.mean(), (stats, jnp.mean(logits.argmax(-1) == labels))

        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (stats, accuracy)), gradients = gradient_fn(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, stats, opt_state), Scores(loss, accuracy)

    def train(
        state: TrainState, images: Array, labels: Array, epoch: Array
    ) -> tuple[TrainState, Scores]:
        steps = len(images) // batch_size
        order_key, augment_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = jax.random.permutation(order_key, len(images))[: steps * batch_size]

        def body(state: TrainState, batch: tuple[Array, Array]):
            rows, key = batch
            return step(state, images[rows], labels[rows], key)

        batches = order.reshape(steps, batch_size), jax.random.split(augment_key, steps)
        state, scores = jax.lax.scan(body, state, batches)
        return state, jax.tree.map(jnp.mean, scores)

    return train


def _evaluation(
    graph: nnx.GraphDef, preparation: Preparation, batch_size: int
) -> Callable[[TrainState, Array, Array], Scores]:
    """Return a pass over all test rows; the last batch is filled up and masked."""

    def evaluate(state: TrainState, images: Array, labels: Array) -> Scores:
        model = nnx.merge(graph, state.params, state.batch_stats)
        rows = len(images)
        batches = -(-rows // batch_size)
        order = jnp.arange(batches * batch_size).reshape(batches, batch_size)

        def body(_: None, row: Array) -> tuple[None, Scores]:
            label = labels[row % rows]
            logits = model(preparation.normalise(images[row % rows]), train=False)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            right = logits.argmax(-1) == label
            return None, Scores(
                jnp.where(row < rows, loss, 0).sum(), jnp.sum(right & (row < rows))
            )

        _, sums = jax.lax.scan(body, None, order)
        return jax.tree.map(lambda column: column.sum() / rows, sums)

    return evaluate


def _refresh(
    analyze: Analyze, *, balanced: bool
) -> Callable[[TrainState], tuple[TrainState, tb_optax.Analysis]]:
    def refresh(state: TrainState) -> tuple[TrainState, tb_optax.Analysis]:
        analysis = analyze(state.params)
        if balanced:
            opt_state = tb_optax.set_multipliers(state.opt_state, analysis)
            state = state._replace(opt_state=opt_state)
        return state, analysis

    return refresh
