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
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import commandline, machine

if TYPE_CHECKING:  # What is imported here would not see which cores it has.
    from benchmarks.steps import Runner


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return commandline.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    commandline.check_output(options.out, force=options.force)
    machine.bind_cores(options.cores)

    from benchmarks import models, steps

    commandline.check_names("--model", [options.model], models.NAMES)
    task = steps.Task(
        options.model, options.width, options.batch, options.side, options.dtype
    )
    analyze = task.analyze()
    optimizers = steps.optimizers(analyze, options.interval)
    runners = {}
    for name, optimizer in optimizers.items():
        commandline.say(f"{name}: compiling")
        runners[name] = steps.Runner(task, optimizer)

    given = sys.argv[1:] if arguments is None else list(arguments)
    results = machine.describe("benchmarks.step_cost", given)
    results["task"] = {
        "model": options.model,
        "width": options.width,
        "batch": options.batch,
        "side": options.side,
        "dtype": options.dtype,
        "interval": options.interval,
    }
    results["memory"] = {name: run.temporary_bytes for name, run in runners.items()}
    parts: dict[str, Callable[[], Mapping[str, Any]]] = {
        "step": lambda: _steps(runners, options.repeats),
        "refresh": lambda: _refreshes(runners, analyze, options.repeats),
        "cycle": lambda: _cycles(runners, options.cycles, options.interval),
    }
    for part, measure in parts.items():
        commandline.say(f"measuring: {part}")
        results[part] = measure()
        commandline.write_results(options.out, results)
    print(options.out)


def _parser() -> argparse.ArgumentParser:
    parser = commandline.Parser(
        prog="python -m benchmarks.step_cost",
        description="Measure what TempBalance costs a training step.",
        allow_abbrev=False,
    )
    add, number = parser.add_argument, commandline.whole_number
    add("--model", default="resnet18", help="a network of benchmarks.models")
    add(
        "--width",
        type=commandline.positive_number,
        default=0.25,
        help="factor on its channels (0.25)",
    )
    add("--batch", type=number, default=32, help="images of a step (32)")
    add("--side", type=number, default=32, help="height and width of an image (32)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--interval", type=number, default=50, help="steps between refreshes (50)")
    add("--repeats", type=number, default=200, help="rounds (200)")
    add("--cycles", type=number, default=10, help="intervals that are run (10)")
    commandline.add_output(parser, "step_cost.json")
    return parser


def _steps(runners: Mapping[str, "Runner"], repeats: int) -> dict[str, list[float]]:
    from benchmarks import timing

    # The first update after a refresh. In a spread cycle every update has its piece.
    between = {name: run for name, run in runners.items() if name != "spread"}
    return timing.interleave(
        between, repeats, before=lambda name: runners[name].move_to(1)
    )


def _refreshes(
    runners: Mapping[str, "Runner"], analyze: Callable[[Any], Any], repeats: int
) -> dict[str, list[float]]:
    import jax

    from benchmarks import timing

    def analysis() -> None:
        jax.block_until_ready(analyze(runners["without"].state.params))

    calls = {
        "without": runners["without"],
        "refresh": runners["plain"],
        "analysis": analysis,
    }
    return timing.interleave(
        calls, repeats, before=lambda _: runners["plain"].move_to(0)
    )


def _cycles(
    runners: Mapping[str, "Runner"], cycles: int, interval: int
) -> dict[str, list[list[float]]]:
    """Return seconds of each step: by cycle, then by position."""
    from benchmarks import timing

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
