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
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tb_optax
from benchmarks import cells, commandline, loop, models, timing
from benchmarks.arms import ARMS, Arm
from benchmarks.configs import CIFAR10, Config
from benchmarks.images import Dataset, Preparation

CLASSES = 100
_EPOCH = 50_000  # Images of CIFAR.

# Bounds: a step between refreshes / without TempBalance, the slowest step / the median
# one, and one analysis / an epoch, on an accelerator.
_OF_STEP = 1.02
_OF_MEDIAN_STEP = 1.5
_OF_EPOCH = 0.01


class Runner:
    """A compiled step with its state, which each call moves on, on one batch."""

    def __init__(self, config: Config, arm: Arm, side: int):
        rng, size = np.random.default_rng(0), config.batch_size
        pixels = rng.integers(0, 256, (size, side, side, 3), np.uint8)
        rows = jax.device_put((pixels, rng.integers(0, CLASSES, size, np.int32)))
        preparation = Preparation.of(pixels, pad=0, flip=False)
        dataset = Dataset({"train": rows}, CLASSES, preparation)
        program = loop.make_program(config, arm, dataset)
        self.state, self.analyze = program.start(0, 0.01), program.analysis(0)
        self._rest = rows, (jnp.arange(size), jax.random.key(0))
        step = jax.jit(program.step, donate_argnums=0)
        self._step = step.lower(self.state, *self._rest).compile()
        self.temporary_bytes = timing.temporary_bytes(self._step)

    def __call__(self, steps: int = 1) -> None:
        """Take steps and wait for the last of them."""
        for _ in range(steps):
            self.state, _ = self._step(self.state, *self._rest)
        jax.block_until_ready(self.state)

    def move_to(self, count: int) -> None:
        """Let the next call be the update of this count."""

        def ours(node: Any) -> bool:
            return isinstance(node, tb_optax.TempBalanceState)

        def moved(node: Any) -> Any:
            new = jnp.full((), count, jnp.int32)
            return node._replace(count=new) if ours(node) else node

        opt_state = jax.tree.map(moved, self.state.opt_state, is_leaf=ours)
        self.state = jax.block_until_ready(self.state._replace(opt_state=opt_state))


def arms(interval: int) -> dict[str, Arm]:
    """Return SGD with momentum, without TempBalance and with each form of it."""
    balanced = ARMS["tb"]
    return {
        "without": ARMS["cal"],
        "interval=None": balanced,
        "plain": dataclasses.replace(balanced, interval=interval),
        "spread": dataclasses.replace(balanced, interval=interval, spread=True),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    number, positive = commandline.whole_number, commandline.positive_number
    dtypes = ("float32", "bfloat16")
    options = {
        "--model": {"default": "resnet18", "help": "a network of benchmarks.models"},
        "--width": {"type": positive, "default": 0.25, "help": "of its layers (0.25)"},
        "--batch": {"type": number, "default": 32, "help": "images of a step (32)"},
        "--side": {"type": number, "default": 32, "help": "of an image (32)"},
        "--dtype": {"choices": dtypes, "default": "float32"},
        "--interval": {"type": number, "default": 50, "help": "of refreshes (50)"},
        "--repeats": {"type": number, "default": 200, "help": "rounds (200)"},
        "--cycles": {"type": number, "default": 10, "help": "whole intervals (10)"},
    }
    description = "Measure what TempBalance costs a training step."
    return commandline.measured("step_cost", description, options, _measure, arguments)


def _measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    commandline.check_names("--model", [options.model], models.NAMES)
    config = dataclasses.replace(
        CIFAR10,
        model=options.model,
        width=options.width,
        batch_size=options.batch,
        compute=options.dtype,
    )
    runners = {}
    for name, arm in arms(options.interval).items():
        commandline.say(f"{name}: compiling")
        runners[name] = Runner(config, arm, options.side)
    task = ("model", "width", "batch", "side", "dtype", "interval")
    yield {"task": {name: getattr(options, name) for name in task}}
    yield {"memory": {name: run.temporary_bytes for name, run in runners.items()}}
    commandline.say("measuring: step, refresh, cycle")
    # The first update after a refresh. In a spread cycle every update has its piece.
    between = {name: run for name, run in runners.items() if name != "spread"}
    seconds = timing.interleave(
        between, options.repeats, before=lambda name: runners[name].move_to(1)
    )
    yield {"step": seconds}
    without, plain = runners["without"], runners["plain"]
    calls = {
        "without": without,
        "refresh": plain,
        "analysis": lambda: jax.block_until_ready(plain.analyze(without.state.params)),
    }
    before = {"before": lambda _: plain.move_to(0)}
    yield {"refresh": timing.interleave(calls, options.repeats, **before)}
    del runners["interval=None"]
    yield {"cycle": cycles(runners, options.cycles, options.interval)}


def cycles(
    runners: Mapping[str, Runner], count: int, interval: int
) -> dict[str, list[list[float]]]:
    """Return seconds of each step: by cycle, then by position."""
    for run in runners.values():
        run.move_to(0)
        run()  # The whole refresh at count 0 is part of no cycle.
        run.move_to(interval - 1)  # One call is not counted.
    samples = timing.interleave(runners, count * interval)
    return {
        name: np.reshape(seconds, (count, interval)).tolist()
        for name, seconds in samples.items()
    }


# --- tables ---------------------------------------------------------------------------


def section(results: Mapping[str, Any]) -> Iterator[str]:
    """Give the section of a file of results."""
    task, seconds = results["task"], results["step"]
    yield from cells.head("Training step", results)
    yield (
        f"{task['model']}, width {task['width']}, {task['dtype']}, batch of "
        f"{task['batch']} images of {task['side']} x {task['side']}, SGD with "
        f"momentum; a refresh every {task['interval']} steps."
    )
    yield cells.table(_bounds(results))
    yield "Seconds of a training step, none with a refresh:"
    yield cells.table(
        {
            "": name,
            "seconds": cells.cell(seconds[name]),
            "/ without": cells.ratio_cell(seconds, name, "without"),
        }
        for name in seconds
    )
    yield "Seconds of a training step with a whole refresh, and of the analysis alone:"
    refresh = results["refresh"]
    yield cells.table([{name: cells.cell(own) for name, own in refresh.items()}])
    yield "Steps of whole intervals; the median over intervals at each position:"
    rows = []
    for name, samples in results["cycle"].items():
        positions = np.median(samples, axis=0)
        median, slowest = np.median(positions), positions.max()
        rows.append(
            {
                "": name,
                "median position, s": cells.number(median),
                "slowest, s": cells.number(slowest),
                "which": positions.argmax(),
                "slowest / median": cells.number(slowest / median),
                "mean, s": cells.number(positions.mean()),
            }
        )
    yield cells.table(rows)
    yield "Temporary memory of the compiled step:"
    memory = results["memory"]
    yield cells.table(
        [{name: f"{cells.megabytes(memory[name])} MB" for name in memory}]
    )


def _bounds(results: Mapping[str, Any]) -> Iterator[cells.Row]:
    step, refresh = results["step"], results["refresh"]
    for name in ("plain", "interval=None"):
        what = f"training step, {name}, between refreshes / without"
        ratio = timing.ratios(step[name], step["without"])
        yield cells.against(what, ratio, _OF_STEP)
    for name, bound in (("spread", _OF_MEDIAN_STEP), ("without", None)):
        positions = np.median(results["cycle"][name], axis=0)
        what = f"slowest of {len(positions)} positions / median one, {name}"
        ratio = positions.max() / np.median(positions)
        # One number, from so many samples.
        yield cells.against(what, [ratio] * len(results["cycle"][name]), bound)
    steps = _EPOCH / results["task"]["batch"]
    of_step = timing.ratios(refresh["analysis"], refresh["without"])
    bound = None if results["hardware"]["platform"] == "cpu" else _OF_EPOCH
    what = f"one analysis / an epoch of {_EPOCH} images"
    yield cells.against(what, [ratio / steps for ratio in of_step], bound)


if __name__ == "__main__":
    sys.exit(main())
