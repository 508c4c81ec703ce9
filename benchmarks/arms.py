"""The arms of a comparison: each is one Optax chain; see `benchmarks.published`.

Some arms are controls, which keep what a method does to the learning rate on average
and drop what it does layer by layer: `mean`, `shuffled`, and those named `..._mean`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

import tb_optax
from benchmarks.baselines import add_spectral_norm_gradient, lookahead, scale_by_sgdp
from benchmarks.configs import ArmName, Config, Fit, Metric
from benchmarks.controls import Control, averaged, reversed_order, shuffled
from benchmarks.published import Settings, settings

Analyze = Callable[[optax.Params], tb_optax.Analysis]
Seed = int | Array

# Published: the spectral norm is λ_max; the column of that name is its square root.
METRICS: dict[Metric, str | Callable[[tb_optax.Analysis], Array]] = {
    "alpha": "alpha",
    "alpha_hat": "alpha_hat",
    "spectral_norm": lambda analysis: analysis.spectral_norm**2,
}

FITS: dict[Fit, Callable[..., tb_optax.PowerLaw]] = {
    "median": tb_optax.fit_median(),
    "min_ks": tb_optax.fit_min_ks(),
    "peak": tb_optax.fit_peak(),
}


class Recipe(NamedTuple):
    """What an optimizer is built from."""

    config: Config
    numbers: Settings
    schedule: optax.Schedule
    seed: Seed


def cosine_with_a_restart(rate: float | Array, epochs: int) -> optax.Schedule:
    """Return two cosines from a rate to 0, each over half of the epochs (SGDR)."""
    halves = [(epochs + 1) // 2, max(1, epochs // 2)]
    cosines = [optax.cosine_decay_schedule(rate, half) for half in halves]
    return optax.join_schedules(cosines, halves[:1])


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: its name on the command line.
        title: its name in tables and pictures.
        optimizer: builds the part that moves the weights.
        by_epoch: turns the first rate and the number of epochs into the rate of each.
        balanced: whether the optimizer holds multipliers that an analysis refreshes.
        control: changes the multipliers of an analysis before they are used.
        once: whether the multipliers of the first analysis are kept.
        interval: steps from one refresh in the step to the next; None: the refreshes
            are calls of their own, which are timed.
        spread: whether such a refresh is spread over its interval.
        parts: options of `layer_analysis` that differ from those of TempBalance.
    """

    name: ArmName
    title: str
    optimizer: Callable[[Recipe], optax.GradientTransformation]
    by_epoch: Callable[..., optax.Schedule] = optax.cosine_decay_schedule
    balanced: bool = False
    control: Control | None = None
    once: bool = False
    interval: int | None = None
    spread: bool = False
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def schedule(
        self, config: Config, steps_per_epoch: int, rate: float | Array
    ) -> optax.Schedule:
        """Return the learning rate by steps; a cosine changes between epochs only."""
        if config.warmup:
            rising = config.warmup * steps_per_epoch
            falling = max(1, config.epochs * steps_per_epoch - rising)
            up = optax.linear_schedule(0.0, rate, rising)
            down = optax.linear_schedule(rate, 0.0, falling)
            return optax.join_schedules([up, down], [rising])
        by_epoch = self.by_epoch(rate, config.epochs)
        return lambda count: by_epoch(jnp.floor_divide(count, steps_per_epoch))

    def analysis(
        self, config: Config, layers: tuple[tb_optax.Layer, ...], seed: Seed
    ) -> Analyze:
        """Return the analysis that sets the multipliers of the arm."""
        numbers = settings(config, self.name)
        options: dict[str, Any] = {
            "fit": FITS[config.fit],
            "metric": METRICS[config.metric],
            "assign": tb_optax.linear(numbers.low, numbers.high),
        }
        analyze = tb_optax.layer_analysis(layers, **(options | dict(self.parts)))
        if (control := self.control) is None:
            return analyze

        def controlled(params: optax.Params) -> tb_optax.Analysis:
            analysis = analyze(params)
            multipliers = control(analysis.multipliers, analysis.tuned, seed)
            return dataclasses.replace(analysis, multipliers=multipliers)

        return controlled

    def build(
        self,
        config: Config,
        analyze: Analyze,
        steps_per_epoch: int,
        seed: Seed,
        rate: float | Array,
    ) -> optax.GradientTransformation:
        """Return the optimizer."""
        schedule = self.schedule(config, steps_per_epoch, rate)
        recipe = Recipe(config, settings(config, self.name), schedule, seed)
        optimizer = self.optimizer(recipe)
        if not self.balanced:
            return optimizer
        refreshed = {"interval": self.interval, "spread": self.spread}
        return tb_optax.temp_balance(optimizer, analyze, **refreshed)


def _sgd(recipe: Recipe) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(recipe.config.weight_decay),
        optax.sgd(recipe.schedule, recipe.config.momentum),
    )


def _snr(recipe: Recipe) -> optax.GradientTransformation:
    penalty = add_spectral_norm_gradient(recipe.numbers.snr, seed=recipe.seed)
    return optax.chain(penalty, _sgd(recipe))


def _lars(recipe: Recipe) -> optax.GradientTransformation:
    # Published without momentum, and with this addend to the norm of the gradient.
    decay = recipe.config.weight_decay
    return optax.lars(recipe.schedule, decay, eps=1e-5, momentum=0.0)


def _lamb(recipe: Recipe) -> optax.GradientTransformation:
    lamb = optax.lamb(recipe.schedule, weight_decay=recipe.config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), lamb)


def _lookahead(recipe: Recipe) -> optax.GradientTransformation:
    return lookahead(_sgd(recipe), period=10, step_size=0.8)


def _sgdp(recipe: Recipe) -> optax.GradientTransformation:
    moved = scale_by_sgdp(recipe.config.momentum, recipe.config.weight_decay)
    return optax.chain(moved, optax.scale_by_learning_rate(recipe.schedule))


def _adamw(recipe: Recipe) -> optax.GradientTransformation:
    return optax.adamw(recipe.schedule, weight_decay=100 * recipe.config.weight_decay)


def _balanced(name: ArmName, title: str, **parts: Any) -> list[Arm]:
    """Return SGD with a form of TempBalance, and its mean-matched control."""
    mean: Any = "mean" if name == "tb" else f"{name}_mean"
    arm = Arm(name, title, _sgd, balanced=True, parts=parts)
    words = f"{title.removesuffix(' by layers')}, mean-matched"
    return [arm, dataclasses.replace(arm, name=mean, title=words, control=averaged)]


_TB, _MEAN = _balanced("tb", "TempBalance")

_ALL = (
    Arm("cal", "cosine SGD", _sgd),
    _TB,
    Arm("snr", "SNR", _snr),
    Arm("tb_snr", "TempBalance + SNR", _snr, balanced=True),
    Arm("sgdr", "SGDR", _sgd, by_epoch=cosine_with_a_restart),
    Arm("lars", "LARS", _lars),
    Arm("lamb", "LAMB", _lamb),
    Arm("lookahead", "Lookahead", _lookahead),
    Arm("sgdp", "SGDP", _sgdp),
    Arm("tb_sgdp", "TempBalance + SGDP", _sgdp, balanced=True),
    Arm("adamw", "AdamW", _adamw),
    _MEAN,
    Arm("shuffled", "TempBalance, shuffled", _sgd, balanced=True, control=shuffled),
    Arm(
        "reversed", "TempBalance, reversed", _sgd, balanced=True, control=reversed_order
    ),
    Arm("shape_only", "TempBalance, first alphas kept", _sgd, balanced=True, once=True),
    *_balanced("farms", "FARMS", windows=tb_optax.windows(), min_eigenvalues=5),
    *_balanced("relative", "relative alpha", metric=tb_optax.relative_alpha),
    *_balanced(
        "sigmoid",
        "Model Balancing by layers",
        fit=tb_optax.fit_median(1.5),
        assign=tb_optax.sigmoid(),
    ),
)

ARMS: dict[str, Arm] = {arm.name: arm for arm in _ALL}
