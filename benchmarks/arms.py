"""The arms of a comparison: each one Optax chain; see `benchmarks.published`."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax import Array

import tb_optax
from benchmarks.baselines import add_spectral_norm_gradient, scale_by_sgdp
from benchmarks.configs import Config
from benchmarks.controls import (
    Analyze,
    Seed,
    averaged,
    scale_by_one_multiplier,
    shuffled,
)
from benchmarks.lookahead import lookahead
from benchmarks.published import Settings, settings

# Published: the spectral norm is λ_max; the column of that name is its square root.
METRICS: dict[str, str | Callable[[tb_optax.Analysis], Array]] = {
    "alpha": "alpha",
    "alpha_hat": "alpha_hat",
    "spectral_norm": lambda analysis: analysis.spectral_norm**2,
}

FITS = {
    "median": tb_optax.fit_median(),
    "min_ks": tb_optax.fit_min_ks(),
    "peak": tb_optax.fit_peak(),
}

Optimizer = Callable[
    [Config, Settings, optax.Schedule, Seed], optax.GradientTransformation
]


def cosine(rate: float, epochs: int) -> optax.Schedule:
    """Return a cosine from a rate to 0."""
    return optax.cosine_decay_schedule(rate, epochs)


def cosine_with_a_restart(rate: float, epochs: int) -> optax.Schedule:
    """Return two cosines from a rate to 0, each over half of the epochs (SGDR)."""
    halves = [(epochs + 1) // 2, max(1, epochs // 2)]
    return optax.join_schedules([cosine(rate, half) for half in halves], halves[:1])


def as_it_is(analyze: Analyze, seed: Seed) -> Analyze:
    """Return the analysis: TempBalance itself, no control."""
    del seed
    return analyze


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: what the command line calls it.
        title: what tables and pictures call it.
        optimizer: from experiment, numbers, schedule and seed to what moves the
            weights.
        by_epoch: from the first rate and the epochs to the rate of each epoch.
        scale: from the analysis to what scales the updates by its multipliers, and
            holds them in its state; None for an arm without.
        control: what becomes of the analysis before its multipliers are used.
    """

    name: str
    title: str
    optimizer: Optimizer
    by_epoch: Callable[[float, int], optax.Schedule] = cosine
    scale: Callable[[Analyze], optax.GradientTransformation] | None = None
    control: Callable[[Analyze, Seed], Analyze] = as_it_is

    @property
    def balanced(self) -> bool:
        """Whether the optimizer holds multipliers that an analysis refreshes."""
        return self.scale is not None

    def schedule(self, config: Config, steps_per_epoch: int) -> optax.Schedule:
        """Return the learning rate by steps; it changes between epochs."""
        rate = settings(config, self.name).learning_rate
        by_epoch = self.by_epoch(rate, config.epochs)
        return lambda count: by_epoch(jnp.floor_divide(count, steps_per_epoch))

    def analysis(
        self, config: Config, layers: tuple[tb_optax.Layer, ...], seed: Seed
    ) -> Callable[[optax.Params], tb_optax.Analysis]:
        """Return the analysis whose multipliers the arm has."""
        numbers = settings(config, self.name)
        assign = tb_optax.linear(numbers.low, numbers.high)
        analyze = tb_optax.layer_analysis(
            layers, fit=FITS[config.fit], metric=METRICS[config.metric], assign=assign
        )
        return self.control(analyze, seed)

    def build(
        self, config: Config, analyze: Analyze, steps_per_epoch: int, seed: Seed
    ) -> optax.GradientTransformation:
        """Return the optimizer."""
        schedule = self.schedule(config, steps_per_epoch)
        numbers = settings(config, self.name)
        optimizer = self.optimizer(config, numbers, schedule, seed)
        if self.scale is None:
            return optimizer
        return optax.chain(optimizer, self.scale(analyze))


def _temp_balance(analyze: Analyze) -> optax.GradientTransformation:
    # Refreshed from outside, at the start of an epoch, so that its time is known.
    return tb_optax.scale_by_temp_balance(analyze, interval=None)


def _sgd(
    config: Config, numbers: Settings, schedule: optax.Schedule, seed: Seed
) -> optax.GradientTransformation:
    del numbers, seed
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, config.momentum),
    )


def _snr(
    config: Config, numbers: Settings, schedule: optax.Schedule, seed: Seed
) -> optax.GradientTransformation:
    return optax.chain(
        add_spectral_norm_gradient(numbers.snr, seed=seed),
        _sgd(config, numbers, schedule, seed),
    )


def _lars(
    config: Config, numbers: Settings, schedule: optax.Schedule, seed: Seed
) -> optax.GradientTransformation:
    del numbers, seed
    # Published without momentum, and with this addend to the norm of the gradient.
    return optax.lars(schedule, config.weight_decay, eps=1e-5, momentum=0.0)


def _lamb(
    config: Config, numbers: Settings, schedule: optax.Schedule, seed: Seed
) -> optax.GradientTransformation:
    del numbers, seed
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.lamb(schedule, weight_decay=config.weight_decay),
    )


def _lookahead(
    config: Config, numbers: Settings, schedule: optax.Schedule, seed: Seed
) -> optax.GradientTransformation:
    return lookahead(_sgd(config, numbers, schedule, seed), period=10, step_size=0.8)


def _sgdp(
    config: Config, numbers: Settings, schedule: optax.Schedule, seed: Seed
) -> optax.GradientTransformation:
    del numbers, seed
    return optax.chain(
        scale_by_sgdp(config.momentum, config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _adamw(
    config: Config, numbers: Settings, schedule: optax.Schedule, seed: Seed
) -> optax.GradientTransformation:
    del numbers, seed
    return optax.adamw(schedule, weight_decay=100 * config.weight_decay)


_ALL = (
    Arm("cal", "cosine SGD", _sgd),
    Arm("tb", "TempBalance", _sgd, scale=_temp_balance),
    Arm("snr", "SNR", _snr),
    Arm("tb_snr", "TempBalance + SNR", _snr, scale=_temp_balance),
    Arm("sgdr", "SGDR", _sgd, by_epoch=cosine_with_a_restart),
    Arm("lars", "LARS", _lars),
    Arm("lamb", "LAMB", _lamb),
    Arm("lookahead", "Lookahead", _lookahead),
    Arm("sgdp", "SGDP", _sgdp),
    Arm("tb_sgdp", "TempBalance + SGDP", _sgdp, scale=_temp_balance),
    Arm("adamw", "AdamW", _adamw),
    Arm(
        "mean",
        "cosine SGD, mean-matched",
        _sgd,
        scale=scale_by_one_multiplier,
        control=averaged,
    ),
    Arm(
        "shuffled",
        "TempBalance, shuffled",
        _sgd,
        scale=_temp_balance,
        control=shuffled,
    ),
)

ARMS = {arm.name: arm for arm in _ALL}
