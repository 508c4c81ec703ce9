"""What TempBalance costs a training step.

    python -m benchmarks.step_cost
    python -m benchmarks.step_cost --width 1 --batch 128 --dtype bfloat16

SGD with momentum on random images of CIFAR's shape. Without TempBalance, refreshed by
the host (`interval=None`), refreshed in the step (`plain`) and piece by piece
(`spread`); always in turn:

- `step`: a step in which no refresh is due.
- `refresh`: a step with a whole refresh, and the analysis alone.
- `cycle`: every step of whole intervals, by position.
- `memory`: temporary bytes of the compiled steps.

Faults of the arguments are one line on stderr and exit code 2.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import commandline, timing

_TASK = ("model", "width", "batch", "side", "dtype")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    description = "Measure what TempBalance costs a training step."
    return commandline.measured(
        "step_cost", description, _add_options, _measure, arguments
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add, number = parser.add_argument, commandline.whole_number
    positive = commandline.positive_number
    add("--model", default="resnet18", help="a network of benchmarks.models")
    add("--width", type=positive, default=0.25, help="factor on its channels (0.25)")
    add("--batch", type=number, default=32, help="images of a step (32)")
    add("--side", type=number, default=32, help="height and width of an image (32)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--interval", type=number, default=50, help="steps between refreshes (50)")
    add("--repeats", type=number, default=200, help="rounds (200)")
    add("--cycles", type=number, default=10, help="intervals that are run (10)")


def _measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    # What is imported before the cores are bound would not see which they are.
    from benchmarks import models, steps

    commandline.check_names("--model", [options.model], models.NAMES)

    def parts() -> Iterator[dict[str, Any]]:
        task = steps.Task(*(getattr(options, name) for name in _TASK))
        analyze, interval = task.analyze(), options.interval
        runners = {}
        for name, optimizer in steps.optimizers(analyze, interval).items():
            commandline.say(f"{name}: compiling")
            runners[name] = steps.Runner(task, optimizer)
        yield {"task": {k: getattr(options, k) for k in (*_TASK, "interval")}}
        yield {"memory": {name: run.temporary_bytes for name, run in runners.items()}}
        commandline.say("measuring: step, refresh, cycle")
        yield {"step": _steps(runners, options.repeats)}
        yield {"refresh": _refreshes(runners, analyze, options.repeats)}
        yield {"cycle": _cycles(runners, options.cycles, interval)}

    return parts()


def _steps(runners: Mapping[str, Any], repeats: int) -> timing.Samples:
    # The first update after a refresh. In a spread cycle every update has its piece.
    between = {name: run for name, run in runners.items() if name != "spread"}
    return timing.interleave(
        between, repeats, before=lambda name: runners[name].move_to(1)
    )


def _refreshes(
    runners: Mapping[str, Any], analyze: Callable[[Any], Any], repeats: int
) -> timing.Samples:
    import jax

    without, plain = runners["without"], runners["plain"]
    calls = {
        "without": without,
        "refresh": plain,
        "analysis": lambda: jax.block_until_ready(analyze(without.state.params)),
    }
    return timing.interleave(calls, repeats, before=lambda _: plain.move_to(0))


def _cycles(
    runners: Mapping[str, Any], cycles: int, interval: int
) -> dict[str, list[list[float]]]:
    """Return seconds of each step: by cycle, then by position."""
    running = {name: run for name, run in runners.items() if name != "interval=None"}
    for run in running.values():
        run.move_to(0)
        run()  # The whole refresh at count 0 is part of no cycle.
        run.move_to(interval - 1)  # One call is not counted.
    samples = timing.interleave(running, cycles * interval)
    return {
        name: [values[i : i + interval] for i in range(0, len(values), interval)]
        for name, values in samples.items()
    }


if __name__ == "__main__":
    sys.exit(main())
