"""What an analysis costs, next to the published way to the same alphas.

    python -m benchmarks.spectral
    python -m benchmarks.spectral --nets resnet18 vit_b16 --repeats 5 --out FILE.json

Parts, all of them unless `--parts` chooses:

- `analysis`: from kernels to alphas, this library and the published way in PyTorch in
  turn, with the threads that both have by default.
- `compilation`: seconds to load LAPACK, which JAX does once per process, then to trace
  and to compile the analysis; its temporary memory. Each time in a new process, where
  neither JAX nor XLA remembers anything; nothing is computed.

Results are written part by part. Without PyTorch the published way is left out with a
line on stderr. Faults of the arguments are one line on stderr and exit code 2. For
fewer cores, put `taskset -c 0` in front.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import tb_optax
from benchmarks import cells, commandline, timing
from benchmarks.networks import networks
from benchmarks.peers import OURS, QUADRATURE, TORCH, compare

# What each part measures, unless `--nets` chooses.
PARTS = {
    "analysis": (
        *("resnet18", "resnet34", "vgg16", "wrn16x8", "wrn28x6", "vit_b16"),
        *("gpt2", "llm_block"),
    ),
    "compilation": ("resnet18", "resnet152", "llm_block"),
}

# Bounds of analysis time / the published way: on a CPU by network, on a GPU for all.
_OF_TORCH_CPU = dict.fromkeys(("resnet18", "wrn28x6", "vgg16", "vit_b16"), 0.5)
_OF_TORCH_GPU = 0.1
_QUADRATURE_OF_EXACT = 0.25  # Of a 4096-wide LLM block.
_COMPILE_SECONDS = {"resnet18": 5.0, "resnet152": 9.0}
_TEMPORARY_MEGABYTES = {"resnet18": 200.0, "llm_block": 1000.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    number, positive = commandline.whole_number, commandline.positive_number
    named = "networks; a wrong name lists those there are"
    beyond = "start no further round of a comparison beyond these seconds (600)"
    options = {
        "--parts": {"nargs": "+", "default": list(PARTS), "help": "default: all"},
        "--nets": {"nargs": "+", "help": named},
        "--repeats": {"type": number, "default": 7, "help": "rounds (7)"},
        "--budget": {"type": positive, "default": 600.0, "help": beyond},
    }
    description = "Measure the spectral analysis against the published way."
    return commandline.measured("spectral", description, options, _measure, arguments)


def _measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    commandline.check_names("--parts", options.parts, tuple(PARTS))
    commandline.check_names("--nets", options.nets or (), tuple(networks()))
    for part in options.parts:
        found: dict[str, dict[str, Any]] = {}
        for name in options.nets or PARTS[part]:
            network = networks()[name]
            found[name] = {"title": network.title, "layers": len(network.layers)}
            commandline.say(f"{network.title}: {part}")
            if part == "analysis":
                found[name] |= {"matrices": network.matrices, "weights": network.size}
                found[name] |= compare(network, options.repeats, options.budget)
            else:
                runs = [_compile_afresh(name) for _ in range(options.repeats)]
                found[name] |= {key: [run[key] for run in runs] for key in runs[0]}
            yield {part: found}


def compilation(name: str) -> dict[str, Any]:
    """Trace and compile the analysis of a network."""
    network = networks()[name]
    analyze = jax.jit(tb_optax.layer_analysis(network.layers))
    abstract = jax.eval_shape(network.params)
    one = jax.block_until_ready(jnp.ones((1, 1)))  # Before the clock the backend is up.
    begin = time.perf_counter()
    jax.jit(jax.lax.linalg.tridiagonal).lower(one)
    start = time.perf_counter()
    lowered = analyze.lower(abstract)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return {
        "load_seconds": start - begin,
        "trace_seconds": traced - start,
        "compile_seconds": time.perf_counter() - traced,
        "temporary_bytes": timing.temporary_bytes(compiled),
    }


def _compile_afresh(name: str) -> dict[str, Any]:
    program = "import json, sys; from benchmarks.spectral import compilation; "
    program += "print(json.dumps(compilation(sys.argv[1])))"
    caches = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
    process = subprocess.run(
        [sys.executable, "-c", program, name],
        cwd=Path(__file__).parents[1],
        env={k: v for k, v in os.environ.items() if not k.startswith(caches)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(process.stdout)


# --- tables ---------------------------------------------------------------------------


def section(results: Mapping[str, Any]) -> Iterator[str]:
    """Give the section of a file of results."""
    yield from cells.head("Analysis", results)
    yield cells.table(_bounds(results))
    if nets := results.get("analysis", {}):
        yield "Seconds from kernels to the alpha of every layer:"
        yield cells.table(_analysis_row(net) for net in nets.values())
        yield "Largest relative difference of an alpha from this library's:"
        rows = []
        for net in nets.values():
            apart = {k: f"{x:.0e}" for k, x in net["alpha_difference"].items()}
            apart.pop(OURS)
            rows.append({"network": net["title"]} | apart)
        yield cells.table(rows)
    for net in nets.values():
        for name, reason in net["missing"].items():
            yield f"{net['title']}, without {name}: {reason}."
    if nets := results.get("compilation"):
        yield "Compilation, each in a new process:"
        yield cells.table(
            {
                "network": net["title"],
                "layers": net["layers"],
                "seconds to load LAPACK": cells.cell(net["load_seconds"]),
                "to trace": cells.cell(net["trace_seconds"]),
                "to compile": cells.cell(net["compile_seconds"]),
                "temporary MB": cells.megabytes(max(net["temporary_bytes"])),
            }
            for net in nets.values()
        )


def _analysis_row(net: Mapping[str, Any]) -> cells.Row:
    row = {
        "network": net["title"],
        "layers": net["layers"],
        "matrices": net["matrices"],
    }
    row["weights, M"] = cells.number(net["weights"] / 1e6)
    row |= {name: cells.cell(samples) for name, samples in net["seconds"].items()}
    if TORCH in net["seconds"]:
        row[f"{OURS} / PyTorch"] = cells.ratio_cell(net["seconds"], OURS, TORCH)
    return row


def _bounds(results: Mapping[str, Any]) -> Iterator[cells.Row]:
    on_cpu = results["hardware"]["platform"] == "cpu"
    for name, net in results.get("analysis", {}).items():
        seconds, what = net["seconds"], f"analysis of {net['title']}"
        bound = _OF_TORCH_CPU.get(name) if on_cpu else _OF_TORCH_GPU
        if bound is not None and TORCH in seconds:
            ratio = timing.ratios(seconds[OURS], seconds[TORCH])
            yield cells.against(f"{what} / published way in PyTorch", ratio, bound)
        if QUADRATURE in seconds:
            ratio = timing.ratios(seconds[QUADRATURE], seconds[OURS])
            what = f"{what}, quadrature / exact"
            yield cells.against(what, ratio, _QUADRATURE_OF_EXACT)
    nets = results.get("compilation", {})
    for name in (name for name in _COMPILE_SECONDS if name in nets):
        net = nets[name]
        both = zip(net["trace_seconds"], net["compile_seconds"], strict=True)
        what = f"tracing and compiling the analysis of {net['title']}, s"
        yield cells.against(what, [*map(sum, both)], _COMPILE_SECONDS[name])
    for name in (name for name in _TEMPORARY_MEGABYTES if name in nets):
        used = [size / cells.MEGABYTE for size in nets[name]["temporary_bytes"]]
        what = f"temporary memory of the analysis of {nets[name]['title']}, MB"
        yield cells.against(what, used, _TEMPORARY_MEGABYTES[name])


if __name__ == "__main__":
    sys.exit(main())
