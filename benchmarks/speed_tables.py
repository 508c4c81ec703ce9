"""The sections of measured speeds: every figure next to its bound."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.cells import MEGABYTE, Row, cell, number, ratio_cell, spread_cell, table
from benchmarks.timing import Summary, ratios, summary

_OURS = "tb_optax"
_QUADRATURE = "tb_optax, quadrature"
_TORCH = "torch.linalg.svdvals"
_WEIGHTWATCHER = "WeightWatcher"
_EPOCH = 50_000  # Images of CIFAR.

# Bounds of analysis time / the published way: on a CPU by network, on a GPU for all.
_OF_TORCH_CPU = dict.fromkeys(("resnet18", "wrn28x6", "vgg16", "vit_b16"), 0.5)
_OF_TORCH_GPU = 0.1
_QUADRATURE_OF_EXACT = 0.25  # Of a 4096-wide LLM block.
_OF_WEIGHTWATCHER = {"fit": 0.1, "whole": 0.5}
_OF_STEP = 1.02
_OF_MEDIAN_STEP = 1.5
_OF_EPOCH = 0.01
_COMPILE_SECONDS = {"resnet18": 5.0, "resnet152": 9.0}
_TEMPORARY_MEGABYTES = {"resnet18": 200.0, "llm_block": 1000.0}

Results = Mapping[str, Any]


def _head(title: str, results: Results) -> Iterator[str]:
    """Heading, hardware, threads, versions and command."""
    hardware, threads = results["hardware"], results["threads"]
    yield f"## {title}: {hardware['device']} ({hardware['platform']})"
    host = f"{hardware['processor']}, {hardware['cores']} cores"
    named = ", ".join(f"{name}={value}" for name, value in threads.items())
    versions = ", ".join(f"{name} {text}" for name, text in results["versions"].items())
    yield (
        f"Host: {host}, {named or 'default threads'}; "
        f"load before: {hardware['load_before']}. {versions}."
    )
    yield f"```bash\n{results['command']}\n```"


def spectral(results: Results) -> Iterator[str]:
    """Give the section of a file of `benchmarks.spectral`."""
    yield from _head("Analysis", results)
    yield table(_spectral_bounds(results))
    if nets := results.get("analysis", {}):
        yield "Seconds from kernels to the alpha of every layer:"
        yield table(_analysis_row(net) for net in nets.values())
        yield "Largest relative difference of an alpha from this library's:"
        rows = []
        for net in nets.values():
            apart = {k: f"{x:.0e}" for k, x in net["alpha_difference"].items()}
            apart.pop(_OURS)
            rows.append({"network": net["title"]} | apart)
        yield table(rows)
    for net in nets.values():
        for name, reason in net["missing"].items():
            yield f"{net['title']}, without {name}: {reason}."
    if nets := results.get("compilation"):
        yield "Compilation, each in a new process:"
        yield table(
            {
                "network": net["title"],
                "layers": str(net["layers"]),
                "seconds to load LAPACK": cell(net["load_seconds"]),
                "to trace": cell(net["trace_seconds"]),
                "to compile": cell(net["compile_seconds"]),
                "temporary MB": number(max(net["temporary_bytes"]) / MEGABYTE),
            }
            for net in nets.values()
        )


def _analysis_row(net: Results) -> Row:
    row = {name: str(net[name]) for name in ("layers", "matrices")}
    row = {"network": net["title"], **row, "weights, M": number(net["weights"] / 1e6)}
    row |= {name: cell(samples) for name, samples in net["seconds"].items()}
    if _TORCH in net["seconds"]:
        row[f"{_OURS} / PyTorch"] = ratio_cell(net["seconds"], _OURS, _TORCH)
    return row


def _spectral_bounds(results: Results) -> Iterator[Row]:
    for name, net in results.get("analysis", {}).items():
        bound = _OF_TORCH_GPU if _on_gpu(results) else _OF_TORCH_CPU.get(name)
        what = f"analysis of {net['title']}"
        if bound is not None and _TORCH in net["seconds"]:
            ratio = _ratio(net["seconds"], _OURS, _TORCH)
            yield _against(f"{what} / published way in PyTorch", ratio, bound)
        if _QUADRATURE in net["seconds"]:
            ratio = _ratio(net["seconds"], _QUADRATURE, _OURS)
            yield _against(f"{what}, quadrature / exact", ratio, _QUADRATURE_OF_EXACT)
    nets = results.get("compilation", {})
    for name in (name for name in _COMPILE_SECONDS if name in nets):
        net = nets[name]
        both = zip(net["trace_seconds"], net["compile_seconds"], strict=True)
        what = f"tracing and compiling the analysis of {net['title']}, s"
        yield _against(what, summary([*map(sum, both)]), _COMPILE_SECONDS[name])
    for name in (name for name in _TEMPORARY_MEGABYTES if name in nets):
        used = [size / MEGABYTE for size in nets[name]["temporary_bytes"]]
        what = f"temporary memory of the analysis of {nets[name]['title']}, MB"
        yield _against(what, summary(used), _TEMPORARY_MEGABYTES[name])


def weightwatcher(results: Results) -> Iterator[str]:
    """Give the section of a file of `benchmarks.weightwatcher`."""
    size = results["size"]
    yield from _head(f"A {size} x {size} matrix, minimum-KS fit", results)
    names = {
        "fit": "fit, eigenvalues given",
        "whole": "whole analysis",
        "process": "whole process, from a file",
    }
    rows = []
    for part in [part for part in names if part in results]:
        bound = _OF_WEIGHTWATCHER.get(part)
        seconds, alphas = results[part]["seconds"], results[part]["alphas"]
        ratio = _ratio(seconds, _OURS, _WEIGHTWATCHER)
        row = _against(f"{names[part]}, {_OURS} / {_WEIGHTWATCHER}", ratio, bound)
        row |= {f"{name}, s": cell(own) for name, own in seconds.items()}
        apart = abs(alphas[_OURS] / alphas[_WEIGHTWATCHER] - 1)
        rows.append(row | {"alphas apart": f"{apart:.0e}"})
    yield table(rows)


def step_cost(results: Results) -> Iterator[str]:
    """Give the section of a file of `benchmarks.step_cost`."""
    task, seconds = results["task"], results["step"]
    yield from _head("Training step", results)
    yield (
        f"{task['model']}, width {task['width']}, {task['dtype']}, batch of "
        f"{task['batch']} images of {task['side']} x {task['side']}, SGD with "
        f"momentum; a refresh every {task['interval']} steps."
    )
    yield table(_step_bounds(results))
    yield "Seconds of a training step, none with a refresh:"
    yield table(
        {
            "": name,
            "seconds": cell(seconds[name]),
            "/ without": ratio_cell(seconds, name, "without"),
        }
        for name in seconds
    )
    yield "Seconds of a training step with a whole refresh, and of the analysis alone:"
    yield table([{name: cell(own) for name, own in results["refresh"].items()}])
    yield "Steps of whole intervals; the median over intervals at each position:"
    rows = []
    for name, cycles in results["cycle"].items():
        positions, figure = _positions(cycles)
        rows.append(
            {
                "": name,
                "median position, s": number(figure.median),
                "slowest, s": number(figure.high),
                "which": str(positions.index(figure.high)),
                "slowest / median": number(figure.high / figure.median),
                "mean, s": number(sum(positions) / len(positions)),
            }
        )
    yield table(rows)
    yield "Temporary memory of the compiled step:"
    memory = results["memory"]
    yield table([{name: f"{number(memory[name] / MEGABYTE)} MB" for name in memory}])


def _step_bounds(results: Results) -> Iterator[Row]:
    for name in ("plain", "interval=None"):
        what = f"training step, {name}, between refreshes / without"
        yield _against(what, _ratio(results["step"], name, "without"), _OF_STEP)
    for name in ("spread", "without"):
        cycles = results["cycle"][name]
        positions, figure = _positions(cycles)
        ratio = figure.high / figure.median
        what = f"slowest of {len(positions)} positions / median one, {name}"
        bound = _OF_MEDIAN_STEP if name == "spread" else None
        yield _against(what, Summary(ratio, ratio, ratio, len(cycles)), bound)
    refresh, steps = results["refresh"], _EPOCH / results["task"]["batch"]
    of_step = ratios(refresh["analysis"], refresh["without"])
    share = summary([ratio / steps for ratio in of_step])
    what = f"one analysis / an epoch of {_EPOCH} images"
    yield _against(what, share, _OF_EPOCH if _on_gpu(results) else None)


def _on_gpu(results: Results) -> bool:
    return results["hardware"]["platform"] != "cpu"


def _ratio(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> Summary:
    return summary(ratios(seconds[name], seconds[other]))


def _positions(cycles: Sequence[Sequence[float]]) -> tuple[list[float], Summary]:
    """Return the median over cycles at each position, and what they come to."""
    positions = [summary(samples).median for samples in zip(*cycles, strict=True)]
    return positions, summary(positions)


def _against(what: str, figure: Summary, bound: float | None) -> Row:
    met = "" if bound is None else ("yes" if figure.median <= bound else "**no**")
    return {
        "what": what,
        "measured": spread_cell(figure),
        "samples": str(figure.count),
        "at most": "" if bound is None else f"{bound:g}",
        "met": met,
    }
