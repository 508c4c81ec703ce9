"""Train a small Llama on the source text of Python's standard library, byte by byte.

The text is on every machine that has Python, about 11 MB without the tests of the
library. Files go to training (90 %), validation and test by the hash of their name, so
that no file is in two parts.

References:
    Touvron et al, `LLaMA: Open and Efficient Foundation Language Models
    <https://arxiv.org/abs/2302.13971>`_, 2023
"""

import dataclasses
import functools
import hashlib
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import tb_optax
from benchmarks.configs import LanguageConfig
from benchmarks.controls import (
    Control,
    averaged,
    controlled,
    reversed_order,
    shuffled,
)
from benchmarks.errors import UserError
from benchmarks.loop import (
    Program,
    Scores,
    TrainState,
    assembled,
    cross_entropy,
    keys,
    training_step,
)
from benchmarks.models.llama import Llama
from tb_optax import recipes

VOCABULARY = 256  # Bytes.

# Directories of the standard library that hold tests, or text of other programs.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Bytes to train on (N,), and windows (windows, length + 1) to evaluate on."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def parts(self) -> dict[str, tuple[np.ndarray]]:
        """Return the rows of each part."""
        return {
            "train": (self.train,),
            "validation": (self.validation,),
            "test": (self.test,),
        }

    def digest(self) -> str:
        """Return a SHA-256 over everything that a run reads."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for (part,) in self.parts().values():
            digest.update(repr(part.shape).encode())
            digest.update(part.tobytes())
        return digest.hexdigest()


def load(config: LanguageConfig, directory: Path | None = None) -> Text:
    """Read all Python files below a directory.

    Args:
        config: says how large windows are.
        directory: default: the standard library.

    Raises:
        UserError: if a part has not enough text.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if directory is None else directory
    files: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _LEFT_OUT & set(name.parts):
            files[_part(name)].append(path.read_bytes())
    parts = {
        name: np.frombuffer(b"".join(all_), np.uint8) for name, all_ in files.items()
    }
    for name, part in parts.items():
        if len(part) < config.length + 2:
            msg = f"{root} has {len(part)} bytes in Python files for {name}; too few"
            raise UserError(msg)
    return Text(
        parts["train"],
        *(_windows(parts[name], config) for name in ("validation", "test")),
    )


def _part(name: Path) -> str:
    """Choose the part of a file: one of 20 is for validation, one for the test."""
    drawn = hashlib.sha256(name.as_posix().encode()).digest()[0] % 20
    return {0: "validation", 1: "test"}.get(drawn, "train")


def _windows(text: np.ndarray, config: LanguageConfig) -> np.ndarray:
    """Return windows at equal distances."""
    starts = np.linspace(0, len(text) - config.length - 1, config.windows).astype(int)
    return text[starts[:, None] + np.arange(config.length + 1)]


# --- arms -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the balance of an arm is built from."""

    config: LanguageConfig
    layers: tuple[tb_optax.Layer, ...]

    @property
    def total(self) -> int:
        """Number of updates of a run."""
        return self.config.epochs * self.config.steps


Layers = tuple[tb_optax.Layer, ...]
Balance = Callable[[Setting, Layers], optax.GradientTransformationExtraArgs]


def without_ends(layers: Layers) -> Layers:
    """Leave out the first and the last layer."""
    return layers[1:-1]


@dataclasses.dataclass(frozen=True)
class LanguageArm:
    """One way to train a language model: AdamW, balanced or not.

    Attributes:
        name: its name in files.
        title: its name in tables and pictures.
        balance: builds the published method from a `tb_optax.recipes`.
        chosen: chooses the layers to tune.
        decay: whether the method takes the place of the weight decay.
        control: what the arm does to the multipliers of the method.
        parent: the arm that a control is held against, and inherits its rate from.
    """

    name: str
    title: str
    balance: Balance | None = None
    chosen: Callable[[Layers], Layers] = without_ends
    decay: bool = False
    control: Control | None = None
    parent: str | None = None

    # For the trainer: the refreshes are in the training step.
    balanced = once = False

    def schedule(
        self, config: LanguageConfig, steps_per_epoch: int, rate: float | Array
    ) -> optax.Schedule:
        """Return a warmup in a tenth of the updates, and a cosine to a tenth."""
        total = config.epochs * steps_per_epoch
        up = optax.linear_schedule(0.0, rate, max(1, total // 10))
        down = optax.cosine_decay_schedule(rate, total - total // 10, alpha=0.1)
        return optax.join_schedules([up, down], [total // 10])

    def build(
        self, setting: Setting, seed: Array | int, rate: float | Array
    ) -> optax.GradientTransformation:
        """Return the optimizer."""
        weight_decay = setting.config.weight_decay
        decay = optax.add_decayed_weights(weight_decay, mask=kernels)
        balance = optax.identity()
        if self.balance is not None:
            layers = self.chosen(setting.layers)
            balance = self.balance(setting, layers)
            if self.control is not None:
                analyze = tb_optax.layer_analysis(layers)
                hold = tb_optax.scale_by_temp_balance(analyze, interval=None)
                if self.decay:
                    hold = tb_optax.add_balanced_weight_decay(
                        weight_decay, analyze, interval=None, mask=kernels
                    )
                balance = controlled(balance, hold, self.control, seed)
            if self.decay:
                decay, balance = balance, optax.identity()
        schedule = self.schedule(setting.config, setting.config.steps, rate)
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b2=0.95),
            decay,
            optax.scale_by_learning_rate(schedule),
            balance,
        )


def kernels(params: optax.Params) -> Any:
    """Say which leaves decay: all with two axes."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _temp_balance(setting: Setting, layers: Layers) -> Any:
    return recipes.temp_balance(layers, interval=setting.config.refresh)


def _shape_only(setting: Setting, layers: Layers) -> Any:
    """Keep the multipliers of the first alphas."""
    return recipes.temp_balance(layers, interval=setting.total)


def _with_embedding(layers: Layers) -> Layers:
    """Add the embedding in front, unless it is the head, too."""
    axes = tb_optax.MatrixAxes((0,), (1,))
    embedding = tb_optax.Layer("embedding/embedding", axes)
    others = tuple(layer for layer in layers if layer.path != embedding.path)
    return embedding, *others


def _llr(setting: Setting, layers: Layers) -> Any:
    return recipes.llr(layers, total_steps=setting.total)


def _alpha_decay(setting: Setting, layers: Layers) -> Any:
    return recipes.alpha_decay(
        layers,
        weight_decay=setting.config.weight_decay,
        interval=setting.config.refresh,
        mask=kernels,
    )


def _without_last(layers: Layers) -> Layers:
    return layers[:-1]


def _model_balancing(setting: Setting, layers: Layers) -> Any:
    return recipes.model_balancing(layers, interval=setting.config.refresh)


_METHODS = (
    LanguageArm("temp_balance", "TempBalance", _temp_balance),
    LanguageArm("llr", "LLR", _llr, _with_embedding),
    LanguageArm("alpha_decay", "AlphaDecay", _alpha_decay, decay=True),
    LanguageArm("model_balancing", "Model Balancing", _model_balancing, _without_last),
)


def _mean(arm: LanguageArm) -> LanguageArm:
    return dataclasses.replace(
        arm,
        name=f"{arm.name}_mean",
        title=f"{arm.title}, mean-matched",
        control=averaged,
        parent=arm.name,
    )


_ALL = (
    LanguageArm("uniform", "AdamW"),
    *_METHODS,
    *map(_mean, _METHODS),
    LanguageArm(
        "reversed",
        "TempBalance, reversed",
        _temp_balance,
        control=reversed_order,
        parent="temp_balance",
    ),
    LanguageArm(
        "shuffled",
        "TempBalance, shuffled",
        _temp_balance,
        control=shuffled,
        parent="temp_balance",
    ),
    LanguageArm(
        "shape_only",
        "TempBalance, first alphas kept",
        _shape_only,
        parent="temp_balance",
    ),
)

ARMS: dict[str, LanguageArm] = {arm.name: arm for arm in _ALL}


# --- program --------------------------------------------------------------------------


def make_program(config: LanguageConfig, arm: LanguageArm, data: Text) -> Program:
    """Put together the functions of an arm; nothing is computed yet."""
    del data

    def build(seed: Any) -> Llama:
        return Llama(
            VOCABULARY,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            tied=config.tied,
            rngs=nnx.Rngs(keys(seed)[0]),
        )

    model = nnx.eval_shape(lambda: build(0))
    graph = nnx.graphdef(model)
    layers = tb_optax.trace_layers(
        lambda model, tokens: model(tokens),
        model,
        jax.ShapeDtypeStruct((1, config.length), jnp.int32),
        norms="none",
    )
    setting = Setting(config, layers)
    analyze = tb_optax.layer_analysis(layers)

    @jax.jit
    def initial(seed: Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(seed), nnx.Param))

    def start(seed: Any, rate: Any) -> TrainState:
        seed, rate = jnp.uint32(seed), jnp.float32(rate)
        params = initial(seed)
        return TrainState(seed, rate, params, {}, optimizer(seed, rate).init(params))

    def optimizer(seed: Any, rate: Any) -> optax.GradientTransformation:
        return arm.build(setting, seed, rate)

    def loss_fn(params: Any, stats: Any, windows: Array):
        logits = nnx.merge(graph, params)(windows[:, :-1])
        losses = cross_entropy(logits, windows[:, 1:])
        accuracy = jnp.mean(logits.argmax(-1) == windows[:, 1:])
        loss = losses.mean()
        return loss, (stats, Scores(loss, accuracy))

    def train(state: TrainState, text: Array, epoch: Array):
        step = training_step(loss_fn, optimizer)
        key = jax.random.fold_in(keys(state.seed)[1], epoch)
        places = jax.random.randint(
            key, (config.steps, config.batch_size), 0, len(text) - config.length
        )
        window = functools.partial(_window, text, config.length + 1)

        def body(state: TrainState, starts: Array):
            return step(state, jax.vmap(window)(starts))

        state, scores = jax.lax.scan(body, state, places)
        return state, jax.tree.map(jnp.mean, scores)

    def evaluate(state: TrainState, windows: Array) -> Scores:
        def score(window: Array) -> Scores:
            return loss_fn(state.params, None, window[None].astype(jnp.int32))[1][1]

        scores = jax.lax.map(score, windows, batch_size=config.batch_size)
        return jax.tree.map(jnp.mean, scores)

    def refresh(state: TrainState) -> tuple[TrainState, tb_optax.Analysis]:
        return state, analyze(state.params)

    return assembled(layers, start, train, jax.jit(evaluate), refresh)


def _window(text: Array, length: int, start: Array) -> Array:
    return jax.lax.dynamic_slice(text, (start,), (length,)).astype(jnp.int32)
