"""A comparison as Markdown, from the summary of `benchmarks.outcomes`."""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from benchmarks.arms import ARMS
from benchmarks.cells import Row, table
from benchmarks.paired import Estimate, differences, estimate, ratios

Summary = Mapping[str, Any]

_ACCURACIES = {
    "last": "Test accuracy behind the last epoch, %:",
    "selected": "Test accuracy of the epoch that is best on the validation set, %:",
    "best": (
        "Best test accuracy of all epochs, %. It is selected on the test set, as the "
        "published accuracies are, and is too high for that:"
    ),
}


def section(summary: Summary, pictures: Sequence[str]) -> Iterator[str]:
    """Give the parts of a comparison's section.

    Args:
        summary: what the runs came to.
        pictures: links to its pictures.
    """
    runs = [run for run in summary["runs"] if "last" in run]
    devices = {_device(command): None for command in summary["commands"]}
    lengths = sorted({config["epochs"] for config in summary["configs"].values()})
    epochs = f"{' or '.join(map(str, lengths))} epoch{'s' if lengths != [1] else ''}"
    yield f"## Comparison {summary['name']}, {epochs}: {', '.join(devices)}"
    yield from _remarks(summary, runs)
    for field, words in _ACCURACIES.items():
        percent = _by_place(runs, field, 100)
        if percent:
            yield words
            yield table(_accuracy_rows(summary, percent))
    if runs:
        yield (
            "Images per second of training, refreshes of the multipliers included, "
            "without the first epoch:"
        )
        yield table(_speed_rows(summary, runs))
    for picture in pictures:
        yield f"![{PurePosixPath(picture).stem}]({picture})"
    yield from _setting(summary)


Place = tuple[str, str]


def _by_place(
    runs: Sequence[Mapping[str, Any]], field: str, factor: float = 1
) -> dict[Place, dict[int, float]]:
    """Return a number of each seed, by variant and arm."""
    found: dict[Place, dict[int, float]] = {}
    for run in runs:
        if run.get(field) is not None:
            by_seed = found.setdefault((run["variant"], run["arm"]), {})
            by_seed[run["seed"]] = factor * run[field]
    return found


def _remarks(summary: Summary, runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    seeds = summary["seeds"]
    named = ", ".join(map(str, seeds))
    yield (
        f"Seeds: {named}. A cell is the mean over seeds ± the sample standard "
        "deviation; a difference or a ratio is paired by seed, with the 95 % interval "
        "of its mean by Student's t. No finished run is left out."
    )
    if len(seeds) == 1:
        yield "One seed: there is neither a deviation nor an interval."
    missing = {
        (run["variant"], run["arm"], run["seed"]): (
            f"{run['epochs']} of {summary['configs'][run['variant']]['epochs']} epochs"
        )
        for run in summary["runs"]
        if "last" not in run
    }
    if missing:
        yield f"Not finished: {_named(missing)}."
    lost = {
        (run["variant"], run["arm"], run["seed"]): f"first in epoch {run['diverged']}"
        for run in runs
        if run["diverged"] is not None
    }
    if lost:
        yield f"A loss was not finite: {_named(lost)}."


def _named(runs: Mapping[tuple[str, str, int], str]) -> str:
    """Return a list of runs, each with a remark: `VARIANT/ARM seed SEED (remark)`."""
    return ", ".join(
        f"{variant}/{arm} seed {seed} ({remark})"
        for (variant, arm, seed), remark in runs.items()
    )


def _accuracy_rows(
    summary: Summary, percent: Mapping[Place, Mapping[int, float]]
) -> Iterator[Row]:
    def difference(place: Place, other: Place) -> str:
        pairs = differences(percent.get(place, {}), percent.get(other, {}))
        return _paired(estimate(pairs), "{:+.2f}")

    for row, place in _rows(summary):
        samples = estimate(list(percent.get(place, {}).values()))
        row["seeds"] = str(samples.count if samples else 0)
        row["accuracy"] = _mean(samples, "{:.2f}")
        yield row | _against(summary, place, "difference to", difference)


def _speed_rows(summary: Summary, runs: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    speeds = _by_place(runs, "images_per_second")
    seconds = _by_place(runs, "seconds")
    analysis = _by_place(runs, "analysis_seconds")

    def ratio(place: Place, other: Place) -> str:
        pairs = ratios(speeds.get(place, {}), speeds.get(other, {}))
        return _paired(estimate(pairs), "{:.3f}")

    for row, place in _rows(summary):
        row["images per second"] = _mean(
            estimate(list(speeds.get(place, {}).values())), "{:.0f}"
        )
        row |= _against(summary, place, "ratio to", ratio)
        total = sum(seconds.get(place, {}).values())
        row["time of all seeds"] = str(datetime.timedelta(seconds=round(total)))
        share = sum(analysis.get(place, {}).values()) / total if total else 0.0
        row["in refreshes"] = f"{share:.2%}"
        yield row


def _rows(summary: Summary) -> Iterator[tuple[Row, Place]]:
    """Give the first cells of each row, and what it is about."""
    for variant in summary["configs"]:
        for arm in summary["arms"]:
            row = {"variant": variant} if len(summary["configs"]) > 1 else {}
            yield row | {"arm": f"{arm} ({ARMS[arm].title})"}, (variant, arm)


def _against(
    summary: Summary, place: Place, words: str, cell: Callable[[Place, Place], str]
) -> Row:
    """Return the cells beside the first arm and beside the first variant."""
    variant, arm = place
    first_arm, first_variant = summary["arms"][0], next(iter(summary["configs"]))
    row = {}
    if len(summary["arms"]) > 1:
        own = arm == first_arm
        row[f"{words} {first_arm}"] = "" if own else cell(place, (variant, first_arm))
    if len(summary["configs"]) > 1:
        own = variant == first_variant
        other = first_variant, arm
        row[f"{words} {first_variant}"] = "" if own else cell(place, other)
    return row


def _mean(samples: Estimate | None, form: str) -> str:
    if samples is None:
        return ""
    mean = form.format(samples.mean)
    if samples.deviation is None:
        return mean
    return f"{mean} ± {form.format(samples.deviation)}"


def _paired(samples: Estimate | None, form: str) -> str:
    if samples is None:
        return ""
    mean = form.format(samples.mean)
    if samples.margin is None:
        return mean
    low, high = samples.mean - samples.margin, samples.mean + samples.margin
    return f"{mean} [{form.format(low)}, {form.format(high)}]"


def _setting(summary: Summary) -> Iterator[str]:
    """Configuration, commands, machines, versions."""
    yield "Numbers of the arms:"
    yield table(_number_rows(summary))
    configs = summary["configs"]
    first = next(iter(configs.values()))
    common = [
        f"{name} {value}"
        for name, value in first.items()
        if value is not None and all(own[name] == value for own in configs.values())
    ]
    yield f"Configuration: {', '.join(common)}."
    by_machine: dict[str, list[str]] = {}
    for command in summary["commands"]:
        hardware, versions = command["hardware"], command["versions"]
        host = f"{hardware['processor']}, {hardware['cores']} cores"
        named = ", ".join(f"{name} {text}" for name, text in versions.items())
        machine = f"On {_device(command)}, host {host}; {named}:"
        by_machine.setdefault(machine, []).append(command["command"])
    for machine, commands in by_machine.items():
        yield machine
        yield "\n".join(["```bash", *commands, "```"])


def _number_rows(summary: Summary) -> Iterator[Row]:
    configs, settings = summary["configs"], summary["settings"]
    varied = [
        name
        for name in next(iter(configs.values()))
        if len({str(own[name]) for own in configs.values()}) > 1
        # These stand in a column of their own, as they are without a value too.
        and name not in ("learning_rate", "low", "high")
    ]
    for row, (variant, arm) in _rows(summary):
        row |= {name: str(configs[variant][name]) for name in varied}
        numbers = settings[variant][arm]
        row["first learning rate"] = f"{numbers['learning_rate']:g}"
        bounds = f"{numbers['low']:g} to {numbers['high']:g}"
        row["multipliers"] = bounds if ARMS[arm].balanced else ""
        yield row


def _device(command: Mapping[str, Any]) -> str:
    return f"{command['hardware']['device']} ({command['hardware']['platform']})"
