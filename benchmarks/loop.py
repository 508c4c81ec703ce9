"""The compiled parts of training: an epoch, an evaluation, a refresh.

The seed is part of the state, so that one compiled program serves all seeds.
"""

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
from benchmarks.controls import Analyze, Seed
from benchmarks.data import Dataset
from benchmarks.data.augment import Preparation


class TrainState(NamedTuple):
    """What an epoch changes or follows, and a checkpoint holds."""

    seed: Array  # shape (), dtype uint32
    params: Any
    batch_stats: Any
    opt_state: Any


class Scores(NamedTuple):
    """Means over the rows of an epoch or of a test set."""

    loss: Array  # shape ()
    accuracy: Array  # shape (), from 0 to 1


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What an arm runs, jitted.

    Attributes:
        layers: the layers that are analysed, in the order of execution.
        abstract: shapes and placement of the state.
        start: `(seed) -> state`, before the first step.
        train: `(states, images, labels, epoch) -> [(state, scores), ...]`, for a tuple
            of states of different seeds at once; consumes them.
        evaluate: `(states, images, labels) -> [scores, ...]`, with running averages.
        refresh: `(state) -> state, analysis`; consumes the state, and sets the
            multipliers if the arm has some.
    """

    layers: tuple[tb_optax.Layer, ...]
    abstract: TrainState
    start: Any
    train: Any
    evaluate: Any
    refresh: Any

    def compiled(self, data: Dataset, count: int) -> "Program":
        """Compile what is timed, for the shapes of a data set.

        Args:
            data: the rows.
            count: how many states are trained at once.
        """
        states = (self.abstract,) * count
        rows = _abstract(data.train_images), _abstract(data.train_labels)
        epoch = jax.ShapeDtypeStruct((), jnp.int32)
        return dataclasses.replace(
            self,
            train=self.train.lower(states, *rows, epoch).compile(),
            refresh=self.refresh.lower(self.abstract).compile(),
        )


def make_program(config: Config, arm: Arm, data: Dataset) -> Program:
    """Put together the functions of an arm; nothing is computed yet."""
    shape = _Shape(
        config.model,
        data.num_classes,
        config.width,
        data.train_images.shape[-1],
        config.init,
        config.compute,
    )
    # Evaluated in full precision, whatever the training computes in.
    plain = nnx.eval_shape(lambda: shape._replace(compute="float32").build(0))
    model = nnx.eval_shape(lambda: shape.build(0))
    layers = balanced_layers(plain, config)
    steps = len(data.train_images) // config.batch_size

    def analysis(seed: Seed) -> Analyze:
        return arm.analysis(config, layers, seed)

    def optimizer(seed: Seed) -> optax.GradientTransformation:
        return arm.build(config, analysis(seed), steps, seed)

    def start(seed: Seed) -> TrainState:
        own = jnp.uint32(seed)
        params, batch_stats = _initial(shape, own)
        return TrainState(own, params, batch_stats, optimizer(own).init(params))

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(start, 0),
    )
    train = _epoch(nnx.graphdef(model), optimizer, data.preparation, config.batch_size)
    evaluate = _evaluation(nnx.graphdef(plain), data.preparation, config.batch_size)
    refresh = _refresh(analysis, balanced=arm.balanced)
    return Program(
        layers,
        abstract,
        start,
        train=jax.jit(_at_once(train), donate_argnums=0),
        evaluate=jax.jit(_at_once(evaluate)),
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
    compute: str

    def build(self, seed: Seed) -> models.Model:
        init_key, _ = _keys(seed)
        return models.build(**self._asdict(), rngs=nnx.Rngs(init_key))


@functools.partial(jax.jit, static_argnums=0)
def _initial(shape: _Shape, seed: Array) -> tuple[Any, Any]:
    """Return parameters and running averages; compiled once for all arms and seeds."""
    _, params, stats = nnx.split(shape.build(seed), nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def _keys(seed: Seed) -> tuple[Array, Array]:
    """Return the keys of the initial weights, and of row order and augmentation."""
    init_key, order_key = jax.random.split(jax.random.key(seed))
    return init_key, order_key


def _at_once(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Return the function of a tuple of states, vectorised; of one it is the same."""

    @functools.wraps(function)
    def at_once(states: tuple[TrainState, ...], *shared: Array) -> list[Any]:
        if len(states) == 1:
            return [function(states[0], *shared)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        vectorised = jax.vmap(lambda state: function(state, *shared))
        results = vectorised(stacked)
        return [
            jax.tree.map(lambda leaf, place=place: leaf[place], results)
            for place in range(len(states))
        ]

    return at_once


def _abstract(array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _epoch(
    graph: nnx.GraphDef,
    optimizer: Callable[[Seed], optax.GradientTransformation],
    preparation: Preparation,
    batch_size: int,
) -> Callable[..., tuple[TrainState, Scores]]:
    """Return one pass over the training rows, in an order of (seed, epoch) alone."""

    def step(
        state: TrainState, images: Array, labels: Array, augment_key: Array
    ) -> tuple[TrainState, Scores]:
        inputs = preparation.augment(augment_key, images)

        def loss_fn(params: Any) -> tuple[Array, tuple[Any, Array]]:
            model = nnx.merge(graph, params, state.batch_stats)
            logits = model(inputs, train=True)
            losses = _cross_entropy(logits, labels)
            stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return losses.mean(), (stats, jnp.mean(logits.argmax(-1) == labels))

        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (stats, accuracy)), gradients = gradient_fn(state.params)
        updates, opt_state = optimizer(state.seed).update(
            gradients, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        following = TrainState(state.seed, params, stats, opt_state)
        return following, Scores(loss, accuracy)

    def train(
        state: TrainState, images: Array, labels: Array, epoch: Array
    ) -> tuple[TrainState, Scores]:
        steps = len(images) // batch_size
        _, key = _keys(state.seed)
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
            loss = _cross_entropy(logits, label)
            right = logits.argmax(-1) == label
            return None, Scores(
                jnp.where(row < rows, loss, 0).sum(), jnp.sum(right & (row < rows))
            )

        _, sums = jax.lax.scan(body, None, order)
        return jax.tree.map(lambda column: column.sum() / rows, sums)

    return evaluate


def _cross_entropy(logits: Array, labels: Array) -> Array:
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _refresh(
    analysis: Callable[[Seed], Analyze], *, balanced: bool
) -> Callable[[TrainState], tuple[TrainState, tb_optax.Analysis]]:
    def refresh(state: TrainState) -> tuple[TrainState, tb_optax.Analysis]:
        analyzed = analysis(state.seed)(state.params)
        if balanced:
            opt_state = tb_optax.set_multipliers(state.opt_state, analyzed)
            state = state._replace(opt_state=opt_state)
        return state, analyzed

    return refresh
