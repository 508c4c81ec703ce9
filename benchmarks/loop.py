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
    """Loss and accuracy of a row, or their means over the rows of a part."""

    loss: Array  # shape ()
    accuracy: Array  # shape (), from 0 to 1


Rows = Sequence[Any]  # Arrays.
Trained = tuple[list[TrainState], list[Scores]]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a run of an arm calls.

    Attributes:
        layers: the layers that are analyzed, in the order of execution.
        initial: `(seed) -> parameters, running averages`.
        optimizer: builds the optimizer from a seed and a learning rate.
        draw: `(seed, rows, epoch) -> batches`, arrays with an axis of steps in front.
        loss: `(parameters, running averages, rows, batch) -> loss, (running averages,
            scores)`, in training.
        score: `(parameters, running averages, *row) -> scores` of one row. Programs
            with equal ones share a compiled evaluation.
        size: rows that are evaluated together.
        analysis: `(seed) -> (parameters) -> analysis`.
        balanced: whether the optimizer has multipliers that an analysis sets.
    """

    layers: tuple[tb_optax.Layer, ...]
    initial: Callable[[Array], tuple[Any, Any]]
    optimizer: Callable[[Seed, Any], optax.GradientTransformation]
    draw: Callable[[Array, Rows, Array], Any]
    loss: Callable[..., tuple[Array, tuple[Any, Scores]]]
    score: Callable[..., Scores]
    size: int
    analysis: Callable[[Seed], Analyze]
    balanced: bool = False

    def start(self, seed: Seed, rate: float | Array) -> TrainState:
        """Return the state before the first step."""
        seed, rate = jnp.uint32(seed), jnp.float32(rate)
        params, batch_stats = self.initial(seed)
        opt_state = self.optimizer(seed, rate).init(params)
        return TrainState(seed, rate, params, batch_stats, opt_state)

    @functools.cached_property
    def abstract(self) -> TrainState:
        """Shapes and placement of the state."""
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(self.start, 0, 0.0),
        )

    def step(self, state: TrainState, rows: Rows, batch: Any):
        """Return the state after a step on a batch, and the scores of the batch."""
        gradient_fn = jax.value_and_grad(self.loss, has_aux=True)
        (_, (stats, scores)), gradients = gradient_fn(
            state.params, state.batch_stats, rows, batch
        )
        updates, opt_state = self.optimizer(state.seed, state.rate).update(
            gradients, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        state = state._replace(params=params, batch_stats=stats, opt_state=opt_state)
        return state, scores

    def epoch(self, rows: Rows, count: int) -> Callable[..., Trained]:
        """Compile an epoch of `count` states at once, of different seeds or rates.

        Returns:
            `(states, rows, epoch) -> states, scores`, in lists, which consumes states.
        """
        draw, step, many = self.draw, self.step, count > 1
        if many:
            draw = jax.vmap(draw, (0, None, None))
            step = jax.vmap(step, (0, None, 0))

        def numbered(
            state: TrainState, sums: Scores, rows: Rows, batches: Any, n: Array
        ):
            batch = jax.tree.map(lambda leaf: leaf[:, n] if many else leaf[n], batches)
            state, scores = step(state, rows, batch)
            return state, jax.tree.map(jnp.add, sums, scores)

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
        drawn = jax.eval_shape(draw, state.seed, rows, number)
        steps = jax.tree.leaves(drawn)[0].shape[int(many)]
        draw = jax.jit(draw).lower(state.seed, rows, number).compile()
        zeros = Scores(*[jnp.zeros(count if many else ())] * 2)
        jitted = jax.jit(numbered, donate_argnums=0)
        step_and_add = jitted.lower(state, zeros, rows, drawn, number).compile()

        def train(states: Sequence[TrainState], rows: Rows, epoch: int) -> Trained:
            state = stacked(states) if many else states[0]
            batches, sums = draw(state.seed, rows, jnp.int32(epoch)), zeros
            for number in range(steps):
                state, sums = step_and_add(
                    state, sums, rows, batches, jnp.int32(number)
                )
            means = jax.tree.map(lambda values: values / steps, sums)
            if not many:
                return [state], [means]
            return unstacked(state), unstacked(means)

        return train

    def evaluate(self, state: TrainState, *rows: Any) -> Scores:
        """Return the mean scores of rows, with running averages."""
        return _evaluate(self.score, self.size, state.params, state.batch_stats, rows)

    @functools.cached_property
    def refresh(self) -> Any:
        """`(state) -> state, analysis`, compiled: consumes the state, sets multipliers.

        Without multipliers, the state is as it was.
        """

        def refresh(state: TrainState) -> tuple[TrainState, tb_optax.Analysis]:
            analyzed = self.analysis(state.seed)(state.params)
            if self.balanced:
                opt_state = tb_optax.set_multipliers(state.opt_state, analyzed)
                state = state._replace(opt_state=opt_state)
            return state, analyzed

        return jax.jit(refresh, donate_argnums=0).lower(self.abstract).compile()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(
    score: Callable[..., Scores], size: int, params: Any, stats: Any, rows: Rows
) -> Scores:
    def scored(row: Rows) -> Scores:
        return score(params, stats, *row)

    scores = jax.lax.map(scored, rows, batch_size=size)
    return jax.tree.map(lambda values: values.mean(dtype=jnp.float32), scores)


def make_program(config: Config, arm: Arm, data: Dataset) -> Program:
    """Put together the functions of an arm; nothing is computed yet."""
    sizes = data.num_classes, config.width, data.parts["train"][0].shape[-1]
    shape = Shape(config.model, *sizes, config.init, config.compute)
    # Evaluation is in full precision, whatever the training computes in.
    plain = nnx.eval_shape(lambda: shape._replace(compute="float32").build(0))
    graph = nnx.graphdef(nnx.eval_shape(lambda: shape.build(0)))
    layers = balanced_layers(plain, config)
    steps = len(data.parts["train"][0]) // config.batch_size
    preparation = data.preparation

    def analysis(seed: Seed) -> Analyze:
        return arm.analysis(config, layers, seed)

    def optimizer(seed: Seed, rate: Array) -> optax.GradientTransformation:
        return arm.build(config, analysis(seed), steps, seed, rate)

    def draw(seed: Array, rows: Rows, epoch: Array) -> tuple[Array, Array]:
        """Return the rows of each batch, and a key to augment them."""
        key = jax.random.fold_in(keys(seed)[1], epoch)
        order_key, augment_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(rows[0]))
        order = order[: steps * config.batch_size].reshape(steps, config.batch_size)
        return order, jax.random.split(augment_key, steps)

    def loss(params: Any, stats: Any, rows: Rows, batch: tuple[Array, Array]):
        (images, labels), (own, key) = rows, batch
        model, labels = nnx.merge(graph, params, stats), labels[own]
        logits = model(preparation.augment(key, images[own]), train=True)
        loss = cross_entropy(logits, labels, config.smoothing).mean()
        accuracy = jnp.mean(logits.argmax(-1) == labels)
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return loss, (stats, Scores(loss, accuracy))

    return Program(
        layers,
        functools.partial(initial, shape),
        optimizer,
        draw,
        loss,
        Score(nnx.graphdef(plain), preparation),
        config.batch_size,
        analysis,
        arm.balanced,
    )


def balanced_layers(model: models.Model, config: Config) -> tuple[tb_optax.Layer, ...]:
    """Return the layers to analyze: as published, without the first and the last."""
    layers = models.layers_in_order(model, norms=config.norms)
    return layers if config.ends else layers[1:-1]


class Score(NamedTuple):
    """The score of an image by a model with running averages."""

    graph: nnx.GraphDef
    preparation: Preparation

    def __call__(self, params: Any, stats: Any, image: Array, label: Array) -> Scores:
        """Return the scores."""
        model = nnx.merge(self.graph, params, stats)
        logits = model(self.preparation.normalize(image)[None], train=False)[0]
        return Scores(cross_entropy(logits, label), logits.argmax(-1) == label)


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


def cross_entropy(logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
    """Return the loss of each label, a share of which is spread over all classes."""
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return losses
    spread = -jax.nn.log_softmax(logits).mean(-1)
    return (1 - smoothing) * losses + smoothing * spread
