"""The protocol of a study: rates are tuned per arm, then fresh seeds are compared.

1. Sweep. Every arm but the controls is trained at the same geometric grid of learning
   rates, from the same few seeds. While the lowest mean validation loss of an arm is at
   an end of its grid, the grid of that arm grows there.
2. Fresh seeds. Every arm is trained from seeds that the sweep has not seen, at the rate
   that its sweep has chosen; a control has the rate of the arm that it is held against.
   All arms of a seed come before the next seed, so that a study that is cut short is an
   honest one with fewer seeds. The test rows are read once, after the last update.

Nothing here trains: `plan` says what comes next, given what is done.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.experiments import MakeProgram

# How often a grid may grow at each of its ends.
REACH = 4


class Trial(NamedTuple):
    """One training."""

    phase: Literal["sweep", "fresh"]
    arm: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.phase}-{self.arm}-{self.rate:g}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and how much of it.

    Attributes:
        config: what all trials have in common.
        arms: arms by name: those that are swept, the first of which the others are
            compared with, and the controls.
        parents: for each control, the arm that it is held against.
        rates: a geometric grid, ascending.
        sweep_seeds: seeds of every point of the sweep.
        fresh_seeds: seeds of the comparison, other ones.
        load: reads the data, from a directory or from where they usually are.
        make: makes the program of an arm.
    """

    config: Any
    arms: Mapping[str, Any]
    parents: Mapping[str, str]
    rates: tuple[float, ...]
    sweep_seeds: tuple[int, ...]
    fresh_seeds: tuple[int, ...]
    load: Callable[[Any, Any], Any]
    make: MakeProgram

    @property
    def swept(self) -> list[str]:
        """The arms whose rate is tuned."""
        return [arm for arm in self.arms if arm not in self.parents]


# The validation loss after the last update, of each trial that is done.
Losses = Mapping[Trial, float]


def plan(study: Study, losses: Losses) -> list[Trial]:
    """Return the trials that can be done now, in order; none if the study is finished.

    The first batch is the sweep; what its grids grow by follows, and the fresh seeds
    come once every arm has its rate.
    """
    grids = {arm: grid(study, losses, arm) for arm in study.swept}
    sweep = [
        Trial("sweep", arm, rates[place], seed)
        for seed in study.sweep_seeds
        for place in range(max(map(len, grids.values())))
        for arm, rates in grids.items()
        if place < len(rates)
    ]
    fresh = []
    if all(trial in losses for trial in sweep):
        fresh = [
            Trial("fresh", arm, chosen(study, losses, arm), seed)
            for seed in study.fresh_seeds
            for arm in study.arms
        ]
    return [trial for trial in (*sweep, *fresh) if trial not in losses]


def grid(study: Study, losses: Losses, arm: str) -> list[float]:
    """Return the rates of an arm, in the order in which they are wanted."""
    wanted, ratio = list(study.rates), study.rates[1] / study.rates[0]
    for _ in range(2 * REACH):
        rates = sorted(wanted)
        means = _means(study, losses, arm, rates)
        best = int(np.argmin(means))  # The first NaN, if there is one.
        if np.isnan(means[best]):
            break
        if best == 0 and rates[0] > study.rates[0] / ratio ** (REACH - 0.5):
            wanted.append(_rounded(rates[0] / ratio))
        elif best == len(rates) - 1 and rates[-1] < study.rates[-1] * ratio ** (
            REACH - 0.5
        ):
            wanted.append(_rounded(rates[-1] * ratio))
        else:
            break
    return wanted


def chosen(study: Study, losses: Losses, arm: str) -> float:
    """Return the rate with the lowest mean validation loss, a control's parent's."""
    own = study.parents.get(arm, arm)
    rates = grid(study, losses, own)
    return rates[int(np.argmin(_means(study, losses, own, rates)))]


def _means(
    study: Study, losses: Losses, arm: str, rates: Sequence[float]
) -> list[float]:
    """Return mean losses; NaN where a trial is missing, infinity where one diverged."""
    means = []
    for rate in rates:
        trials = [Trial("sweep", arm, rate, seed) for seed in study.sweep_seeds]
        found = [losses.get(trial) for trial in trials]
        diverged = [math.inf if math.isnan(x) else x for x in found if x is not None]
        means.append(math.nan if None in found else float(np.mean(diverged)))
    return means


def _rounded(rate: float) -> float:
    """Return a rate in six digits, so that it is the same however it was reached."""
    return float(f"{rate:.6g}")
