"""The directory of a comparison: `comparison.json`, and runs in `VARIANT/seedSEED`.

A run is a directory as `benchmarks.train` makes it.  No arm depends on another and no
seed on another, so that both may be added later; all else stays as it was.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.configs import Config
from benchmarks.data import Dataset
from benchmarks.errors import UserError
from benchmarks.experiment import newest_epochs
from benchmarks.records import RunDirectory, check_place, read_object, replace

_COMPARISON = "comparison.json"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and where.

    Attributes:
        path: the directory.
        name: name in `benchmarks.grids`.
        configs: the experiment of each variant.
        arms: names in `benchmarks.arms`; the others are held against the first.
        seeds: every arm of every variant is trained from each of them.
        commands: what has trained here: commands, machines, versions.
    """

    path: Path
    name: str
    configs: Mapping[str, Config]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    commands: tuple[Mapping[str, Any], ...] = ()

    def places(self) -> Iterator[tuple[str, int]]:
        """Give each variant and seed; all variants of a seed before the next seed."""
        for seed in self.seeds:
            for variant in self.configs:
                yield variant, seed

    def directory(self, variant: str, seed: int) -> RunDirectory:
        """Return where a seed of a variant is trained."""
        return RunDirectory(self.path / variant / f"seed{seed}")

    def config(self, variant: str, seed: int) -> Config:
        """Return the experiment of a seed of a variant."""
        config = self.configs[variant]
        return dataclasses.replace(config, seed=seed, arms=self.arms)

    def done(self) -> dict[tuple[str, str, int], int]:
        """Return the epochs behind the checkpoint of each variant, arm and seed."""
        return {
            (variant, arm, seed): epochs
            for variant, seed in self.places()
            for arm, epochs in newest_epochs(
                self.config(variant, seed), self.directory(variant, seed)
            ).items()
        }

    def joined(self, *, resume: bool) -> "Comparison":
        """Return this comparison together with what its directory has already.

        Args:
            resume: whether it may have something.

        Raises:
            UserError: if that is not of this comparison.
        """
        if check_place(self.path, _COMPARISON, resume=resume):
            return self
        fields = {"name": str, "arms": list, "seeds": list, "commands": list}
        content = read_object(self.path, _COMPARISON, fields)
        if content["name"] != self.name:
            msg = (
                f"CONFIG is {self.name!r}, but {self.path} has a comparison of "
                f"{content['name']!r}; give that, or another --out"
            )
            raise UserError(msg)
        both = dataclasses.replace(
            self,
            arms=tuple(dict.fromkeys([*content["arms"], *self.arms])),
            seeds=tuple(sorted({*content["seeds"], *self.seeds})),
            commands=tuple(content["commands"]),
        )
        for place in both.places():
            directory, config = both.directory(*place), both.config(*place)
            if begun := directory.arms():
                directory.check(dataclasses.replace(config, arms=begun), resume=True)
        return both

    def opened(self, variant: str, seed: int, data: Dataset) -> RunDirectory:
        """Return the directory of a run, which is there and has all arms."""
        directory = self.directory(variant, seed)
        directory.open(self.config(variant, seed), data)
        begun = directory.arms()
        if new := [arm for arm in self.arms if arm not in begun]:
            directory.add_arms(new)
        return directory

    def rewind(self) -> None:
        """Take off what kills have left behind the checkpoints of the runs."""
        for place in self.places():
            directory, config = self.directory(*place), self.config(*place)
            if directory.arms():
                directory.rewind(newest_epochs(config, directory), config)

    def save(self, arguments: Sequence[str]) -> "Comparison":
        """Write down what is compared; return it with the command that trains now."""
        command = machine.describe("benchmarks.compare", arguments)
        del command["hardware"]["load_before"]  # A training lasts too long for it.
        commands = self.commands
        if command not in commands:
            commands = (*commands, command)
        content = {
            "name": self.name,
            "arms": self.arms,
            "seeds": self.seeds,
            "commands": commands,
        }
        self.path.mkdir(parents=True, exist_ok=True)
        replace(self.path / _COMPARISON, json.dumps(content, indent=2) + "\n")
        return dataclasses.replace(self, commands=commands)
