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
from typing import Any

from benchmarks import commandline
from benchmarks.errors import UserError

NETS = (
    *("resnet18", "resnet34", "vgg16", "wrn16x8", "wrn28x6", "vit_b16"),
    *("gpt2", "llm_block"),
)
COMPILED = ("resnet18", "resnet152", "llm_block")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    description = "Measure the spectral analysis against the published way."
    return commandline.measured(
        "spectral", description, _add_options, _measure, arguments
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add, number = parser.add_argument, commandline.whole_number
    add("--parts", nargs="+", default=list(PARTS), help=f"of {' '.join(PARTS)}")
    add("--nets", nargs="+", help="networks; a wrong name lists those there are")
    add("--repeats", type=number, default=7, help="rounds (7)")
    add(
        "--budget",
        type=commandline.positive_number,
        default=600.0,
        metavar="SECONDS",
        help="start no further round of a comparison beyond it (600)",
    )


def _measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    # What is imported before the cores are bound would not see which they are.
    from benchmarks.networks import networks

    commandline.check_names("--parts", options.parts, tuple(PARTS))
    commandline.check_names("--nets", options.nets or (), tuple(networks()))

    def parts() -> Iterator[dict[str, Any]]:
        for part in options.parts:
            chosen, measure = PARTS[part]
            found = {}
            for name in options.nets or chosen:
                network = networks()[name]
                head = {"title": network.title, "layers": len(network.layers)}
                found[name] = head | measure(name, network, options)
                yield {part: found}

    return parts()


def _analysis(_: str, network: Any, options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from benchmarks import peers, timing

    params = network.params()
    calls, alphas, missing = {}, {}, {}
    for title, way in peers.ways(network).items():
        try:
            run = way(network, params)
        except (ModuleNotFoundError, UserError) as error:
            missing[title] = str(error)
            commandline.say(f"{network.title}: without {title}: {error}")
        else:
            # Keep what the last call returns.
            calls[title] = lambda t=title, run=run: alphas.update({t: run()})
    seconds = timing.interleave(
        calls, options.repeats, before=timing.rest, budget=options.budget
    )
    medians = {title: timing.summary(own).median for title, own in seconds.items()}
    listed = ", ".join(f"{title} {median:.3g} s" for title, median in medians.items())
    commandline.say(f"{network.title}: {listed}")
    return {
        "matrices": network.matrices,
        "weights": network.size,
        "seconds": seconds,
        "alpha_difference": {
            title: float(np.max(np.abs(found / alphas[peers.OURS] - 1)))
            for title, found in alphas.items()
        },
        "missing": missing,
    }


def _compilation(
    name: str, network: Any, options: argparse.Namespace
) -> dict[str, Any]:
    from benchmarks.compilation import measure_afresh

    commandline.say(f"{network.title}: compiling {options.repeats} times")
    runs = [measure_afresh(name) for _ in range(options.repeats)]
    return {key: [run[key] for run in runs] for key in runs[0]}


PARTS: dict[str, tuple[Sequence[str], Callable[..., dict[str, Any]]]] = {
    "analysis": (NETS, _analysis),
    "compilation": (COMPILED, _compilation),
}

if __name__ == "__main__":
    sys.exit(main())
