"""What an analysis costs, beside other ways to the same alphas.

    python -m benchmarks.spectral
    python -m benchmarks.spectral --nets resnet18 vit_b16 --repeats 5 --out FILE.json

Parts, all of them unless `--parts` chooses:

- `analysis`: from kernels to alphas, this library beside JAX's `svd` and `eigvalsh`
  and the published way in PyTorch, in turn.
- `eigenvalues`: from Gram matrices to eigenvalues, beside SciPy, and by stages.
- `compilation`: seconds and temporary memory of the compiled analysis, each time in
  a new process.
- `growth`: the analysis of 1, 2, 4 and 8 equal layers.
- `sizes`: the candidate algorithms by size of the matrix.

Results are written part by part. A peer whose package is missing is left out with a
line on stderr. Faults of the arguments are one line on stderr and exit code 2.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import commandline, machine
from benchmarks.errors import UserError

if TYPE_CHECKING:  # What is imported here would fix its number of threads.
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
SIZES = (64, 128, 256, 512, 768, 1024, 4096)
COUNTS = (1, 2, 4, 8)

# Matrices of one size that are decomposed together, and their entries.
_BATCH = 1024
_ENTRIES = 2**22


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return commandline.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    commandline.check_names("--parts", options.parts, tuple(PARTS))
    commandline.check_output(options.out, force=options.force)
    machine.fix_threads(options.threads, options.blas_threads)

    from benchmarks import peers
    from benchmarks.networks import networks

    commandline.check_names("--nets", options.nets or (), tuple(networks()))
    commandline.check_names("--ways", options.ways or (), tuple(peers.WAYS))
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
        description="Measure the spectral analysis beside other ways.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), help=f"of {' '.join(PARTS)}")
    add("--nets", nargs="+", help="networks; a wrong name lists those there are")
    add("--ways", nargs="+", help="of the part analysis, beside tb_optax; default: all")
    add("--repeats", type=commandline.whole_number, default=7, help="rounds (7)")
    add(
        "--budget",
        type=commandline.positive_number,
        default=600.0,
        metavar="SECONDS",
        help="start no further round of a comparison beyond it (600)",
    )
    add(
        "--sizes",
        nargs="+",
        type=commandline.whole_number,
        default=list(SIZES),
        help=f"sizes of the matrices of the part sizes ({' '.join(map(str, SIZES))})",
    )
    add(
        "--growth-side",
        type=commandline.whole_number,
        default=512,
        metavar="CHANNELS",
        help="channels of the equal layers of the part growth (512)",
    )
    commandline.add_output(parser, "spectral.json")
    return parser


def _chosen(options: argparse.Namespace) -> Iterator[tuple[str, "Network"]]:
    from benchmarks.networks import networks

    for name in options.nets or NETS:
        yield name, networks()[name]


def _timed(
    calls: Mapping[str, Callable[[], Any]], options: argparse.Namespace
) -> dict[str, list[float]]:
    from benchmarks import timing

    return timing.interleave(
        calls, options.repeats, before=timing.rest, budget=options.budget
    )


def _analysis(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    import numpy as np

    from benchmarks import peers

    asked = {peers.OURS, *(options.ways or peers.WAYS)}
    chosen = [title for title in peers.WAYS if title in asked]
    for name, network in _chosen(options):
        params = network.params()
        ways, missing = {}, {}
        for title in chosen:
            try:
                ways[title] = peers.WAYS[title](network, params)
            except (ModuleNotFoundError, UserError) as error:
                missing[title] = str(error)
                commandline.say(f"{network.title}: without {title}: {error}")
        alphas = {}
        calls = {title: _kept(alphas, title, run) for title, run in ways.items()}
        seconds = _timed(calls, options)
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


def _eigenvalues(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    import jax

    from benchmarks import peers

    for name, network in _chosen(options):
        grams = peers.gram_matrices(network.params())
        on_device = jax.device_put(grams)
        forms = jax.block_until_ready(peers.reduction(on_device))
        calls = {
            peers.OURS: _blocked(peers.engine, on_device),
            "scipy.linalg.eigvalsh": _blocked(peers.scipy_eigenvalues, grams),
            "reduction": _blocked(peers.reduction, on_device),
            "bisection": _blocked(
                functools.partial(peers.bisection, grams=on_device), forms
            ),
        }
        seconds = _timed(calls, options)
        commandline.say(f"{network.title}, eigenvalues: {_medians(seconds)}")
        yield name, {"title": network.title, "seconds": seconds}


def _compilation(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    from benchmarks.compilation import measure_afresh
    from benchmarks.networks import networks

    for name in options.nets or COMPILED:
        network = networks()[name]
        commandline.say(f"{network.title}: compiling {options.repeats} times")
        runs = [measure_afresh(name) for _ in range(options.repeats)]
        columns = {key: [run[key] for run in runs] for key in runs[0]}
        yield name, {"title": network.title, "layers": len(network.layers)} | columns


def _growth(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    from benchmarks import peers
    from benchmarks.networks import equal_layers

    calls = {}
    for count in COUNTS:
        network = equal_layers(count, options.growth_side)
        calls[str(count)] = peers.tb_optax_way(network, network.params())
    seconds = _timed(calls, options)
    commandline.say(f"equal layers: {_medians(seconds)}")
    yield "equal_layers", {"channels": options.growth_side, "seconds": seconds}


def _sizes(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    import jax
    import jax.numpy as jnp

    from benchmarks import peers

    @jax.jit
    def gram(matrices):
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("bki,bkj->bij", matrices, matrices, precision=highest)

    candidates: dict[str, Callable] = {
        "tridiagonal, bisection": jax.jit(lambda w: peers.engine([gram(w)])),
        "eigvalsh": jax.jit(lambda w: jnp.linalg.eigvalsh(gram(w))),
        "svd": jax.jit(lambda w: jnp.linalg.svd(w, compute_uv=False)),
        "Gram": gram,
    }
    for n in options.sizes:
        batch = min(_BATCH, max(1, _ENTRIES // n**2))
        matrices = jax.random.normal(jax.random.key(n), (batch, n, n)) / n**0.5
        grams = jax.block_until_ready(gram(matrices))
        forms = jax.block_until_ready(peers.reduction([grams]))
        calls = {name: _blocked(run, matrices) for name, run in candidates.items()}
        calls["reduction"] = _blocked(peers.reduction, [grams])
        calls["bisection"] = _blocked(
            functools.partial(peers.bisection, grams=[grams]), forms
        )
        seconds = _timed(calls, options)
        commandline.say(f"{batch} matrices of {n} x {n}: {_medians(seconds)}")
        yield str(n), {"batch": batch, "seconds": seconds}


def _kept(results: dict[str, Any], name: str, run: Callable) -> Callable[[], None]:
    """Keep what the last call returned."""
    return lambda: results.update({name: run()})


def _blocked(function: Callable, argument: Any) -> Callable[[], Any]:
    import jax

    return lambda: jax.block_until_ready(function(argument))


def _medians(seconds: dict[str, list[float]]) -> str:
    from benchmarks.timing import summary

    return ", ".join(
        f"{name} {summary(samples).median:.3g} s" for name, samples in seconds.items()
    )


PARTS: dict[str, Callable[..., Iterator[tuple[str, dict[str, Any]]]]] = {
    "analysis": _analysis,
    "eigenvalues": _eigenvalues,
    "compilation": _compilation,
    "growth": _growth,
    "sizes": _sizes,
}

if __name__ == "__main__":
    sys.exit(main())
