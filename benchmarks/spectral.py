"""What an analysis costs, next to the published way to the same alphas.

    python -m benchmarks.spectral
    python -m benchmarks.spectral --nets resnet18 vit_b16 --repeats 5 --out FILE.json

Parts, all of them unless `--parts` chooses:

- `analysis`: from kernels to alphas, this library and the published way in PyTorch in
  turn, with the threads that both have by default.
- `compilation`: seconds and temporary memory of the compiled analysis, each time in
  a new process.

Results are written part by part. Without PyTorch the published way is left out with a
line on stderr. Faults of the arguments are one line on stderr and exit code 2.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import commandline, machine
from benchmarks.errors import UserError

if TYPE_CHECKING:  # What is imported here would not see which cores it has.
    from benchmarks.networks import Network

NETS = (
    "resnet18",
    "resnet34",
    "vgg16",
    "wrn16x8",
    "wrn28x6",
    "vit_b16",
    "gpt2",
    "llm_block",
)
COMPILED = ("resnet18", "resnet152", "llm_block")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return commandline.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    commandline.check_names("--parts", options.parts, tuple(PARTS))
    commandline.check_output(options.out, force=options.force)
    machine.bind_cores(options.cores)

    from benchmarks.networks import networks

    commandline.check_names("--nets", options.nets or (), tuple(networks()))
    given = sys.argv[1:] if arguments is None else list(arguments)
    results: dict[str, Any] = machine.describe("benchmarks.spectral", given)
    for part in options.parts:
        results[part] = {}
        for name, figures in PARTS[part](options):
            results[part][name] = figures
            commandline.write_results(options.out, results)
    print(options.out)


def _parser() -> argparse.ArgumentParser:
    parser = commandline.Parser(
        prog="python -m benchmarks.spectral",
        description="Measure the spectral analysis against the published way.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), help=f"of {' '.join(PARTS)}")
    add("--nets", nargs="+", help="networks; a wrong name lists those there are")
    add("--repeats", type=commandline.whole_number, default=7, help="rounds (7)")
    add(
        "--budget",
        type=commandline.positive_number,
        default=600.0,
        metavar="SECONDS",
        help="start no further round of a comparison beyond it (600)",
    )
    commandline.add_output(parser, "spectral.json")
    return parser


def _chosen(options: argparse.Namespace) -> Iterator[tuple[str, "Network"]]:
    from benchmarks.networks import networks

    for name in options.nets or NETS:
        yield name, networks()[name]


def _analysis(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    import numpy as np

    from benchmarks import peers, timing

    for name, network in _chosen(options):
        params = network.params()
        ways, missing = {}, {}
        for title, way in peers.ways(network).items():
            try:
                ways[title] = way(network, params)
            except (ModuleNotFoundError, UserError) as error:
                missing[title] = str(error)
                commandline.say(f"{network.title}: without {title}: {error}")
        alphas = {}
        calls = {title: _kept(alphas, title, run) for title, run in ways.items()}
        seconds = timing.interleave(
            calls, options.repeats, before=timing.rest, budget=options.budget
        )
        ours = alphas[peers.OURS]
        commandline.say(f"{network.title}: {_medians(seconds)}")
        yield (
            name,
            {
                "title": network.title,
                "layers": len(network.layers),
                "matrices": network.matrices,
                "weights": network.size,
                "seconds": seconds,
                "alpha_difference": {
                    title: float(np.max(np.abs(found / ours - 1)))
                    for title, found in alphas.items()
                },
                "missing": missing,
            },
        )


def _compilation(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    from benchmarks.compilation import measure_afresh
    from benchmarks.networks import networks

    for name in options.nets or COMPILED:
        network = networks()[name]
        commandline.say(f"{network.title}: compiling {options.repeats} times")
        runs = [measure_afresh(name) for _ in range(options.repeats)]
        columns = {key: [run[key] for run in runs] for key in runs[0]}
        yield name, {"title": network.title, "layers": len(network.layers)} | columns


def _kept(results: dict[str, Any], name: str, run: Callable) -> Callable[[], None]:
    """Keep what the last call returned."""
    return lambda: results.update({name: run()})


def _medians(seconds: dict[str, list[float]]) -> str:
    from benchmarks.timing import summary

    return ", ".join(
        f"{name} {summary(samples).median:.3g} s" for name, samples in seconds.items()
    )


PARTS: dict[str, Callable[..., Iterator[tuple[str, dict[str, Any]]]]] = {
    "analysis": _analysis,
    "compilation": _compilation,
}

if __name__ == "__main__":
    sys.exit(main())
