"""What a comparison trains, and in which order."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tqdm import tqdm

from benchmarks import data
from benchmarks.comparison import Comparison
from benchmarks.experiment import Training

_OF_DATA = ("dataset", "data_dir", "subset", "validation", "batch_size")


class Group(NamedTuple):
    """What is trained at once: seeds of an arm with equally many epochs behind them."""

    variant: str
    arm: str
    seeds: tuple[int, ...]


def groups(asked: Comparison, at_once: int) -> list[Group]:
    """Return what is left to train; all of a seed comes before the next seeds.

    Args:
        asked: the comparison.
        at_once: how many seeds a group has at most.
    """
    done, found = asked.done(), []
    for first in range(0, len(asked.seeds), at_once):
        seeds = asked.seeds[first : first + at_once]
        for variant, arm in itertools.product(asked.configs, asked.arms):
            # A kill between two checkpoints leaves some seeds an epoch behind others.
            alike: dict[int, list[int]] = {}
            for seed in seeds:
                alike.setdefault(done[variant, arm, seed], []).append(seed)
            alike.pop(asked.configs[variant].epochs, None)
            found += [Group(variant, arm, tuple(alike[n])) for n in sorted(alike)]
    return found


def load(asked: Comparison, left: Sequence[Group]) -> dict[str, data.Dataset]:
    """Return the data of each variant that is trained; those of equal ones once."""
    loaded, by_variant = {}, {}
    for variant in dict.fromkeys(group.variant for group in left):
        config = asked.configs[variant]
        what = tuple(getattr(config, field) for field in _OF_DATA)
        if what not in loaded:
            loaded[what] = data.load(config)
        by_variant[variant] = loaded[what]
        digest = by_variant[variant].digest()
        for seed in asked.seeds:
            asked.directory(variant, seed).check_data(digest)
    return by_variant


def train(
    asked: Comparison,
    left: Sequence[Group],
    datasets: Mapping[str, data.Dataset],
    stopping: Callable[[], bool],
    report: Callable[[], None],
) -> None:
    """Train all groups; raise `Preempted` between epochs.

    Args:
        asked: the comparison.
        left: of it, what is trained.
        datasets: of each variant.
        stopping: whether to stop behind the epoch that runs.
        report: called behind each group.
    """
    done, trainings = asked.done(), {}
    total = sum(asked.configs[variant].epochs for variant, _, _ in done)
    with tqdm(total=total, initial=sum(done.values()), unit="epoch") as progress:
        for variant, arm, seeds in left:
            if (variant, arm) not in trainings:
                trainings[variant, arm] = Training(
                    arm, asked.configs[variant], datasets[variant]
                )
            directories = {
                seed: asked.opened(variant, seed, datasets[variant]) for seed in seeds
            }
            title = f"{variant}/{arm}/seed{'+'.join(map(str, seeds))}"
            trainings[variant, arm].run(title, directories, progress, stopping)
            report()
