"""The arms of a comparison: each one Optax chain."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import optax

import tb_optax
from benchmarks.configs import Config

Analyze = Callable[[optax.Params], tb_optax.Analysis]
Build = Callable[[Config, Analyze, int], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: what tables and pictures call it.
        build: from the experiment, the analysis and the steps of an epoch to the
            optimizer.
        balanced: whether the optimizer holds multipliers that an analysis refreshes.
    """

    title: str
    build: Build
    balanced: bool


def cosine_by_epochs(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Return a cosine from the first rate towards 0 that changes between epochs."""
    cosine = optax.cosine_decay_schedule(config.learning_rate, config.epochs)
    return lambda count: cosine(jnp.floor_divide(count, steps_per_epoch))


def _cal(
    config: Config, analyze: Analyze, steps_per_epoch: int
) -> optax.GradientTransformation:
    del analyze
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(cosine_by_epochs(config, steps_per_epoch), config.momentum),
    )


def _tb(
    config: Config, analyze: Analyze, steps_per_epoch: int
) -> optax.GradientTransformation:
    # Refreshed from outside, at the start of an epoch, so that its time is known.
    return optax.chain(
        _cal(config, analyze, steps_per_epoch),
        tb_optax.scale_by_temp_balance(analyze, interval=None),
    )


ARMS = {
    "cal": Arm("cosine SGD", _cal, balanced=False),
    "tb": Arm("TempBalance", _tb, balanced=True),
}
