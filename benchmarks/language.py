"""Train a small Llama on the source text of Python's standard library, byte by byte.

The text is on every machine that has Python, about 11 MB without the tests of the
library. Files go to training (90 %), validation and test by the hash of their name, so
that no file is in two parts.

References:
    Touvron et al, `LLaMA: Open and Efficient Foundation Language Models
    <https://arxiv.org/abs/2302.13971>`_, 2023
"""

import dataclasses
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
from benchmarks import controls, loop
from benchmarks.configs import LanguageConfig
from benchmarks.errors import UserError
from benchmarks.images import Dataset
from benchmarks.loop import Program, Scores
from benchmarks.models.llama import Llama
from tb_optax import recipes

VOCABULARY = 256  # Bytes.

# Directories of the standard library that hold tests, or text of other programs.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}


def load(config: LanguageConfig, directory: Path | None = None) -> Dataset:
    """Read all Python files below a directory, by default the standard library.

    Returns:
        Bytes to train on (N,), and windows (windows, length + 1) to evaluate on.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if directory is None else directory
    files: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _LEFT_OUT & set(name.parts):
            # One file of 20 is for validation, one for the test.
            drawn = hashlib.sha256(name.as_posix().encode()).digest()[0] % 20
            part = {0: "validation", 1: "test"}.get(drawn, "train")
            files[part].append(path.read_bytes())
    parts = {k: np.frombuffer(b"".join(v), np.uint8) for k, v in files.items()}
    for name, part in parts.items():
        if len(part) < config.length + 2:
            there = f"{root} has {len(part)} bytes in Python files for {name}"
            raise UserError(f"{there}; too few")
    for name in ("validation", "test"):  # Windows at equal distances.
        last = len(parts[name]) - config.length - 1
        starts = np.linspace(0, last, config.windows).astype(int)
        parts[name] = parts[name][starts[:, None] + np.arange(config.length + 1)]
    return Dataset({name: (part,) for name, part in parts.items()}, VOCABULARY)


# --- arms -----------------------------------------------------------------------------

Layers = tuple[tb_optax.Layer, ...]
Balance = Callable[[LanguageConfig, Layers], optax.GradientTransformationExtraArgs]


@dataclasses.dataclass(frozen=True)
class LanguageArm:
    """One way to train a language model: AdamW, balanced or not.

    Attributes:
        name: its name in files.
        title: its name in tables and pictures.
        balance: builds the published method from a `tb_optax.recipes`.
        chosen: chooses the layers to tune; default: all but the first and the last.
        decay: whether the method takes the place of the weight decay.
        control: what the arm does to the multipliers of the method.
        parent: the arm that a control is held against, and inherits its rate from.
    """

    name: str
    title: str
    balance: Balance | None = None
    chosen: Callable[[Layers], Layers] = lambda layers: layers[1:-1]
    decay: bool = False
    control: controls.Control | None = None
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
        self,
        config: LanguageConfig,
        layers: Layers,
        seed: Array | int,
        rate: float | Array,
    ) -> optax.GradientTransformation:
        """Return the optimizer for a model with these layers."""
        decay: Any = optax.add_decayed_weights(config.weight_decay, mask=kernels)
        balance: Any = optax.identity()
        if self.balance is not None:
            balance = self.balance(config, self.chosen(layers))
        if self.control is not None:
            analyze = tb_optax.layer_analysis(self.chosen(layers))
            hold = tb_optax.scale_by_temp_balance(analyze, interval=None)
            if self.decay:
                hold = tb_optax.add_balanced_weight_decay(
                    config.weight_decay, analyze, interval=None, mask=kernels
                )
            balance = controls.controlled(balance, hold, self.control, seed)
        if self.decay:
            decay, balance = balance, optax.identity()
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b2=0.95),
            decay,
            optax.scale_by_learning_rate(self.schedule(config, config.steps, rate)),
            balance,
        )


def kernels(params: optax.Params) -> Any:
    """Say which leaves decay: all with two axes."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _alpha_decay(config: LanguageConfig, layers: Layers) -> Any:
    options = {"interval": config.refresh, "mask": kernels}
    return recipes.alpha_decay(layers, weight_decay=config.weight_decay, **options)


def _with_embedding(layers: Layers) -> Layers:
    """Add the embedding in front, unless it is the head, too."""
    axes = tb_optax.MatrixAxes((0,), (1,))
    embedding = tb_optax.Layer("embedding/embedding", axes)
    return embedding, *(layer for layer in layers if layer.path != embedding.path)


_METHODS = (
    LanguageArm(
        "temp_balance",
        "TempBalance",
        lambda config, layers: recipes.temp_balance(layers, interval=config.refresh),
    ),
    LanguageArm(
        "llr",
        "LLR",
        lambda config, layers: recipes.llr(layers, total_steps=config.updates),
        _with_embedding,
    ),
    LanguageArm("alpha_decay", "AlphaDecay", _alpha_decay, decay=True),
    LanguageArm(
        "model_balancing",
        "Model Balancing",
        lambda config, layers: recipes.model_balancing(layers, interval=config.refresh),
        lambda layers: layers[:-1],
    ),
)


def _control(of: LanguageArm, name: str, words: str, **changes: Any) -> LanguageArm:
    """Return a control of a method."""
    changes |= {"name": name, "title": f"{of.title}, {words}", "parent": of.name}
    return dataclasses.replace(of, **changes)


_FIRST = {"balance": lambda c, layers: recipes.temp_balance(layers, interval=c.updates)}

_ALL = (
    LanguageArm("uniform", "AdamW"),
    *_METHODS,
    *(
        _control(of, f"{of.name}_mean", "mean-matched", control=controls.averaged)
        for of in _METHODS
    ),
    _control(_METHODS[0], "reversed", "reversed", control=controls.reversed_order),
    _control(_METHODS[0], "shuffled", "shuffled", control=controls.shuffled),
    # The first refresh is the only one.
    _control(_METHODS[0], "shape_only", "first alphas kept", **_FIRST),
)

ARMS: dict[str, LanguageArm] = {arm.name: arm for arm in _ALL}


# --- program --------------------------------------------------------------------------


def make_program(config: LanguageConfig, arm: LanguageArm, data: Dataset) -> Program:
    """Put together the functions of an arm; nothing is computed yet."""
    del data

    def build(seed: Any) -> Llama:
        sizes = config.width, config.depth, config.heads
        rngs = nnx.Rngs(loop.keys(seed)[0])
        return Llama(VOCABULARY, *sizes, tied=config.tied, rngs=rngs)

    model = nnx.eval_shape(lambda: build(0))
    tokens = jax.ShapeDtypeStruct((1, config.length), jnp.int32)
    layers = tb_optax.trace_layers(Llama.__call__, model, tokens, norms="none")
    graph, analysis = nnx.graphdef(model), tb_optax.layer_analysis(layers)

    @jax.jit
    def initial(seed: Array) -> tuple[Any, Any]:
        return nnx.to_pure_dict(nnx.state(build(seed), nnx.Param)), {}

    def optimizer(seed: Any, rate: Any) -> optax.GradientTransformation:
        return arm.build(config, layers, seed, rate)

    def draw(seed: Array, rows: loop.Rows, epoch: Array) -> Array:
        """Return where the windows of each batch start."""
        key = jax.random.fold_in(loop.keys(seed)[1], epoch)
        shape, last = (config.steps, config.batch_size), len(rows[0]) - config.length
        return jax.random.randint(key, shape, 0, last)

    def scores(params: Any, windows: Array) -> Scores:
        """Return the means over the bytes of windows, given those before."""
        windows = windows.astype(jnp.int32)
        logits = nnx.merge(graph, params)(windows[:, :-1])
        accuracy = jnp.mean(logits.argmax(-1) == windows[:, 1:])
        return Scores(loop.cross_entropy(logits, windows[:, 1:]).mean(), accuracy)

    def loss(params: Any, stats: Any, rows: loop.Rows, starts: Array):
        found = scores(params, rows[0][starts[:, None] + jnp.arange(config.length + 1)])
        return found.loss, (stats, found)

    def score(params: Any, stats: Any, window: Array) -> Scores:
        del stats
        return scores(params, window[None])

    parts = layers, initial, optimizer, draw, loss, score, config.batch_size
    return Program(*parts, analysis=lambda _: analysis)
