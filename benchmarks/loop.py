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


Rows = Sequence[Any]  # Arrays.
Trained = tuple[list[TrainState], list[Scores]]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a run of an arm calls.

    Attributes:
        layers: the layers that are analyzed, in the order of execution.
        start: `(seed, rate) -> state`, before the first step.
        draw: `(state, rows, epoch) -> batches`, arrays with an axis of steps in front.
        step: `(state, rows, batch) -> state, scores`.
        evaluate: `(state, *rows) -> scores`, with running averages; jitted.
        analyze: `(state) -> state, analysis`; sets the multipliers if the arm has some.
    """

    layers: tuple[tb_optax.Layer, ...]
    start: Callable[[Seed, Any], TrainState]
    draw: Callable[..., Any]
    step: Callable[..., tuple[TrainState, Scores]]
    evaluate: Callable[..., Scores]
    analyze: Callable[[TrainState], tuple[TrainState, tb_optax.Analysis]]

    @functools.cached_property
    def refresh(self) -> Any:
        """`analyze`, compiled; consumes the state."""
        jitted = jax.jit(self.analyze, donate_argnums=0)
        return jitted.lower(self.abstract).compile()

    @functools.cached_property
    def abstract(self) -> TrainState:
        """Shapes and placement of the state."""
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(self.start, 0, 0.0),
        )

    def epoch(self, rows: Rows, count: int) -> Callable[..., Trained]:
        """Compile an epoch of `count` states at once, of different seeds or rates.

        Returns:
            `(states, rows, epoch) -> states, scores`, in lists, which consumes states.
        """
        draw, step, many = self.draw, self.step, count > 1
        if many:
            draw = jax.vmap(draw, (0, None, None))
            step = jax.vmap(step, (0, None, 0))

        def numbered(state: TrainState, rows: Rows, batches: Any, number: Array):
            at = (slice(None), number) if many else number
            return step(state, rows, jax.tree.map(lambda leaf: leaf[at], batches))

        def stacked(states: Sequence[TrainState]) -> TrainState:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

        def unstacked(tree: Any) -> list[Any]:
            leaves, structure = jax.tree.flatten(tree)
            return [structure.unflatten(own) for own in zip(*leaves, strict=True)]

        # Compiled ahead of the clock.
        number = jax.ShapeDtypeStruct((), jnp.int32)
        rows = jax.eval_shape(lambda *rows: rows, *rows)
        state = self.abstract
        if many:
            state = jax.eval_shape(stacked, (state,) * count)
        drawn = jax.eval_shape(draw, state, rows, number)
        steps = jax.tree.leaves(drawn)[0].shape[int(many)]
        draw = jax.jit(draw).lower(state, rows, number).compile()
        jitted = jax.jit(numbered, donate_argnums=0)
        step = jitted.lower(state, rows, drawn, number).compile()

        def train(states: Sequence[TrainState], rows: Rows, epoch: int) -> Trained:
            state = stacked(states) if many else states[0]
            batches, scores = draw(state, rows, jnp.int32(epoch)), []
            for number in range(steps):
                state, own = step(state, rows, batches, jnp.int32(number))
                scores.append(own)
            means = jax.tree.map(lambda *own: jnp.stack(own).mean(0), *scores)
            if not many:
                return [state], [means]
            return unstacked(state), unstacked(means)

        return train


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

    def draw(state: TrainState, rows: Rows, epoch: Array) -> tuple[Array, Array]:
        """Return the rows of each batch, and a key to augment them."""
        key = jax.random.fold_in(keys(state.seed)[1], epoch)
        order_key, augment_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(rows[0]))
        order = order[: steps * config.batch_size].reshape(steps, config.batch_size)
        return order, jax.random.split(augment_key, steps)

    update = training_step(image_loss(nnx.graphdef(model), config.smoothing), optimizer)

    def step(state: TrainState, rows: Rows, batch: tuple[Array, Array]):
        (images, labels), (own, key) = rows, batch
        return update(state, data.preparation.augment(key, images[own]), labels[own])

    static = nnx.graphdef(plain), data.preparation, config.batch_size

    def evaluate(state: TrainState, images: Array, labels: Array) -> Scores:
        # The state of the optimizer is left out: one program serves all arms.
        return _evaluate(*static, state._replace(opt_state=()), images, labels)

    def analyze(state: TrainState) -> tuple[TrainState, tb_optax.Analysis]:
        analyzed = analysis(state.seed)(state.params)
        if arm.balanced:
            opt_state = tb_optax.set_multipliers(state.opt_state, analyzed)
            state = state._replace(opt_state=opt_state)
        return state, analyzed

    return Program(layers, start, draw, step, evaluate, analyze)


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
