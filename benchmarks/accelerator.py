"""Everything that an accelerator is needed for, in one command with a budget of time.

    python -m benchmarks.accelerator --minutes 7 --out DIR
    python -m benchmarks.accelerator --minutes 7 --out DIR --resume

Parts, the most valuable first. Each writes a file of its own in DIR after every figure:
what was measured survives when the time is up, and `--resume` measures the rest.

- `parity`: alphas and learning rates of the recorded networks in `tests/data`, in
  float32, against the published code in float64.
- `candidates`: ways to the alphas of a batch of matrices, by size, and for the largest
  batches of four networks; error against float64.
- `analyses`: whole analyses, compared with the published way in PyTorch.
- `training`: ResNet-18 on images of 32 x 32, bfloat16: images per second without and
  with TempBalance, the share of an epoch that refreshes take, the slowest step.
- `images`: the study of that name in `benchmarks.studies`, if `--cifar10` is given;
  `--resume` goes on from what earlier machines have left in DIR.

On a machine without an accelerator all parts run at toy sizes, as a test. Faults of the
arguments are one line on stderr and exit code 2.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import candidates, commandline, machine, peers, recorded, step_cost
from benchmarks.cells import listed, table
from benchmarks.configs import CIFAR10
from benchmarks.errors import UserError
from benchmarks.files import read_json, write_json
from benchmarks.networks import networks
from benchmarks.timing import interleave, ratios

# The share of the time of all parts where images are trained after them.
_BEFORE_IMAGES = 0.75

REPEATS = 5
SIZES = (512, 256, 1024, 128, 2048, 64, 768, 4096)
# The largest batches of equal matrices in a network: (matrices, rows, columns).
BATCHES = {
    "ResNet-18": ((27, 512, 512), (27, 256, 256), (27, 128, 128), (37, 64, 64)),
    "ViT-B/16": ((48, 768, 768), (24, 768, 3072)),
    "GPT-2 block list": ((48, 768, 768), (24, 768, 3072)),
    "4096-wide LLM block": ((4, 4096, 4096), (3, 4096, 11008)),
}
NETS = ("resnet18", "vit_b16", "vgg16", "wrn28x6", "gpt2", "llm_block")
IMAGES = "images"
# A way that took longer than this for one batch is not tried on larger ones.
_SLOW = 5.0
_IMAGES = 50_000  # Of an epoch of CIFAR.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return commandline.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    machine.leave_memory()
    options.out.mkdir(parents=True, exist_ok=True)
    existing = [name for name in PARTS if (options.out / f"{name}.json").exists()]
    if existing and not options.resume:
        there = ", ".join(existing)
        raise UserError(f"{options.out} holds {there}; --resume continues it")
    given = sys.argv[1:] if arguments is None else list(arguments)
    head = machine.describe("benchmarks.accelerator", given)
    head["hardware"].pop("load_before", None)
    toy = jax.default_backend() == "cpu"
    minutes = options.minutes * (_BEFORE_IMAGES if options.cifar10 else 1)
    for name in (name for name in PARTS if name in options.parts):
        path, content = options.out / f"{name}.json", head | {"figures": {}}
        if path.exists():
            content = read_json(path, figures=dict)
            if content.get("hardware") != head["hardware"]:
                raise UserError(
                    f"{path} was measured on {content.get('hardware')}, this is "
                    f"{head['hardware']}; give another directory by --out"
                )
        deadline = started + 60 * minutes * PARTS[name].share
        figures = PARTS[name].measures(toy, options.data)
        for number, (key, measure) in enumerate(figures):
            if key in content["figures"]:
                continue
            # One figure at least, however little time there is.
            if number and time.monotonic() > deadline:
                commandline.say(f"{name}: the time is up before {key}")
                break
            content["figures"][key] = figure = measure()
            write_json(path, content)
            commandline.say(f"{name}: {key}: {json.dumps(figure)[:160]}")
    if options.cifar10 is not None and IMAGES in options.parts:
        deadline = started + 60 * options.minutes
        train_images(options.out / IMAGES, options.cifar10, toy, given, deadline)
    print("\n\n".join(sections(options.out)))


def train_images(
    path: Path, data: Path, toy: bool, given: Sequence[str], deadline: float
) -> None:
    """Train what the time allows of the study; what is not finished is dropped."""
    from benchmarks import studies  # It imports more than the other parts need.

    directory = studies.Directory(path, "images-check" if toy else "images")
    dataset = directory.study.load(directory.study.config, data)
    directory.open(dataset.digest, "benchmarks.accelerator", given)
    try:
        studies.train(directory, dataset, lambda: time.monotonic() > deadline)
    except commandline.Preempted as stopped:
        commandline.say(f"{IMAGES}: the time is up; {stopped}")
    shutil.rmtree(path / studies.RUNNING, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = commandline.Parser(
        prog="python -m benchmarks.accelerator",
        description="Measure all that needs an accelerator, within a budget of time.",
        allow_abbrev=False,
    )
    add, every = parser.add_argument, (*PARTS, IMAGES)
    golden = Path(__file__).parents[1] / "tests" / "data" / "golden"
    numbers = "recorded numbers of the published code; default: tests/data/golden"
    images = "train-*.parquet and test-*.parquet, for the study of images"
    add("--minutes", type=commandline.positive_number, required=True)
    add("--out", type=Path, required=True, metavar="DIR", help="where files go")
    add("--parts", nargs="+", choices=every, default=every, help="default: all")
    add("--resume", action="store_true", help="measure what DIR does not have yet")
    add("--data", type=Path, default=golden, metavar="DIR", help=numbers)
    add("--cifar10", type=Path, metavar="DIR", help=images)
    return parser


Figures = Iterator[tuple[str, Callable[[], Any]]]
Found = Mapping[str, Any]
Rows = list[dict[str, Any]]


def _parity(toy: bool, data: Path) -> Figures:
    names = recorded.names(data)
    chosen = names[:1] if toy else names
    for fit in recorded.FITS:
        yield fit, lambda fit=fit: recorded.compare(data, chosen, fit)


def _candidates(toy: bool, _: Path) -> Figures:
    cases = {f"{n} x {n}": ((max(1, min(64, 2**23 // n**2)), n, n),) for n in SIZES}
    cases |= BATCHES
    if toy:
        cases = {"24 x 24": ((3, 24, 24),), "two batches": ((2, 16, 16), (2, 16, 24))}
    # Entries of the largest matrix that each way was too slow for.
    slow: dict[str, int] = {}

    def measure(way: str, shapes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        entries = max(rows * columns for _, rows, columns in shapes)
        if way in slow and entries > slow[way]:
            return {"left_out": "too slow on smaller matrices"}
        figure = _measure_way(way, [_gaussian(shape) for shape in shapes])
        if figure.get("first_seconds", 0) > _SLOW:
            slow[way] = entries
        return figure

    for case, shapes in cases.items():
        for way in (*candidates.WAYS, peers.TORCH):
            yield f"{case}: {way}", functools.partial(measure, way, shapes)


@functools.cache
def _gaussian(shape: tuple[int, int, int]) -> tuple[jax.Array, float]:
    """Draw a batch of matrices; give the alpha of the first in float64, too."""
    matrices = jax.random.normal(jax.random.key(sum(shape)), shape) / shape[1] ** 0.5
    return matrices, candidates.reference_alpha(matrices[0])


def _measure_way(
    way: str, batches: Sequence[tuple[jax.Array, float]]
) -> dict[str, Any]:
    """Time one way on several batches, one after the other."""
    try:
        calls, seconds, alphas = [], [], []
        for matrices, _ in batches:
            if way == peers.TORCH:
                calls.append(candidates.torch_way(matrices))
            else:
                calls.append(functools.partial(candidates.WAYS[way], matrices))
        # The first round compiles; one more of a slow way tells enough.
        while len(seconds) < (2 if seconds[1:] and seconds[1] > 1 else 1 + REPEATS):
            start = time.perf_counter()
            alphas = jax.block_until_ready([call() for call in calls])
            seconds.append(time.perf_counter() - start)
    except (ModuleNotFoundError, UserError, NotImplementedError, RuntimeError) as error:
        return {"left_out": str(error).partition("\n")[0][:200]}
    pairs = zip(alphas, batches, strict=True)
    return {
        "seconds": seconds[1:],
        "first_seconds": seconds[1],
        "compile_seconds": seconds[0] - seconds[1],
        "error": max(abs(float(found[0]) / alpha - 1) for found, (_, alpha) in pairs),
    }


def _analyses(toy: bool, _: Path) -> Figures:
    for name in ("tiny",) if toy else NETS:
        network = networks()[name]
        yield network.title, functools.partial(peers.compare, network, REPEATS, 20.0)


def _training(toy: bool, _: Path) -> Figures:
    config, side = dataclasses.replace(CIFAR10, compute="bfloat16"), 32
    if toy:
        tiny = dataclasses.replace(CIFAR10, model="resnet4", width=0.5, batch_size=4)
        config, side = tiny, 8
    interval = 3 if toy else _IMAGES // config.batch_size

    @functools.cache
    def runner(name: str) -> step_cost.Runner:
        return step_cost.Runner(config, step_cost.arms(interval)[name], side)

    def throughput() -> dict[str, Any]:
        """Seconds of a step where no refresh is due, many in a row, in turn."""
        count, names = min(50, interval - 1), ("without", "plain")
        calls = {name: functools.partial(runner(name), count) for name in names}
        seconds = interleave(
            calls, REPEATS, before=lambda name: runner(name).move_to(1)
        )
        per_step = {name: (np.divide(seconds[name], count)).tolist() for name in names}
        return {"batch": config.batch_size, "seconds": per_step}

    def refresh() -> dict[str, Any]:
        calls = {"plain": runner("plain")}
        seconds = interleave(
            calls, REPEATS, before=lambda name: runner(name).move_to(0)
        )
        return {"interval": interval, "seconds": seconds["plain"]}

    def slowest(name: str) -> dict[str, Any]:
        """Seconds of every step of an interval, waited for one by one."""
        [seconds] = step_cost.cycles({name: runner(name)}, 1, interval)[name]
        figure = {"slowest": max(seconds), "median": float(np.median(seconds))}
        return figure | {"positions": len(seconds)}

    yield "a step", throughput
    yield "a step with a refresh", refresh
    for name in ("without", "plain", "spread"):
        yield f"the slowest step: {name}", functools.partial(slowest, name)


# --- tables ---------------------------------------------------------------------------


def sections(directory: Path) -> Iterator[str]:
    """Yield the tables of what a directory holds, in Markdown."""
    paths = {name: directory / f"{name}.json" for name in PARTS}
    found = {
        name: read_json(path, figures=dict)
        for name, path in paths.items()
        if path.exists()
    }
    for content in list(found.values())[:1]:
        yield f"## On an accelerator: {content['hardware']['device']}"
        yield f"{listed(content['versions'])}.\n\n```bash\n{content['command']}\n```"
    for name, content in found.items():
        yield f"{PARTS[name].caption}:\n\n{table(PARTS[name].rows(content['figures']))}"


def _milliseconds(seconds: Sequence[float]) -> str:
    low, middle, high = 1e3 * np.quantile(seconds, (0, 0.5, 1))
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def _parity_rows(figures: Found) -> Rows:
    rows = []
    for fit, compared in figures.items():
        layers = sum(figure["layers"] for figure in compared.values())
        row = {"fit": fit, "networks": len(compared), "layers": layers}
        for column in ("alpha", "alpha / allowed", "multiplier"):
            found = [figure.get(column) for figure in compared.values()]
            known = [value for value in found if value is not None]
            row[column] = f"{max(known):.2g}" if known else ""
        rows.append(row)
    return rows


def _candidate_rows(figures: Found) -> Rows:
    rows: dict[str, dict[str, Any]] = {}
    for key, figure in figures.items():
        case, _, way = key.rpartition(": ")
        text = "-"
        if "seconds" in figure:
            text = f"{_milliseconds(figure['seconds'])}, {figure['error']:.0e}"
        rows.setdefault(case, {"matrices": case})[way] = text
    return list(rows.values())


def _analysis_rows(figures: Found) -> Rows:
    rows = []
    for title, figure in figures.items():
        seconds = figure["seconds"]
        row = {"network": title}
        row |= {way: _milliseconds(samples) for way, samples in seconds.items()}
        if peers.TORCH in seconds:
            pairs = ratios(seconds[peers.OURS], seconds[peers.TORCH])
            row["tb_optax / PyTorch"] = f"{np.median(pairs):.3g}"
        rows.append(row)
    return rows


def _training_rows(figures: Found) -> Rows:
    rows: dict[str, float] = {}
    if step := figures.get("a step"):
        medians = {k: np.median(v) for k, v in step["seconds"].items()}
        for name, seconds in medians.items():
            rows[f"images per second, {name}"] = step["batch"] / seconds
        rows["a step, plain / without"] = medians["plain"] / medians["without"]
        if refresh := figures.get("a step with a refresh"):
            extra = np.median(refresh["seconds"]) - medians["plain"]
            rows["milliseconds of a refresh"] = 1e3 * extra
            rows["refresh / epoch"] = extra / (refresh["interval"] * medians["plain"])
    for name in ("without", "plain", "spread"):
        if figure := figures.get(f"the slowest step: {name}"):
            ratio = figure["slowest"] / figure["median"]
            rows[f"slowest step / median, {name}"] = ratio
    return [{"what": what, "figure": f"{value:.5g}"} for what, value in rows.items()]


class Part(NamedTuple):
    """The share of the time at which a part must have ended, its figures and table."""

    share: float
    measures: Callable[[bool, Path], Figures]
    caption: str
    rows: Callable[[Found], Rows]


# What an early part saves of its share, others get.
PARTS = {
    "parity": Part(
        0.2,
        _parity,
        "Recorded networks in float32 against the published code in float64: "
        "largest relative deviation of an alpha, its share of what rounding allows, "
        "and largest deviation of a multiplier",
        _parity_rows,
    ),
    "candidates": Part(
        0.65,
        _candidates,
        "Milliseconds from matrices to the alpha of each, and the largest relative "
        "error of an alpha against float64",
        _candidate_rows,
    ),
    "analyses": Part(
        0.85,
        _analyses,
        "Milliseconds from kernels to the alpha of every layer",
        _analysis_rows,
    ),
    "training": Part(
        1.0,
        _training,
        "A training step of ResNet-18, with TempBalance and without",
        _training_rows,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
