"""Time a minimum-KS fit, an analysis and a whole process against WeightWatcher.

    pip install weightwatcher torch
    python -m benchmarks.weightwatcher

One Gaussian matrix; both fit a power law at every eigenvalue and keep the one with the
smallest Kolmogorov-Smirnov distance. The process reads the matrix from a file;
WeightWatcher, which has no command, runs in the script that its users write. Samples
are taken in turn. Faults of the arguments are one line on stderr and exit code 2.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tb_optax
from benchmarks import cells, commandline, timing
from benchmarks.peers import OURS

PEER = "WeightWatcher"

_SCRIPT = """
import sys
import numpy, torch, weightwatcher
kernel = torch.from_numpy(numpy.load(sys.argv[1])["kernel"])
linear = torch.nn.Linear(*kernel.shape, bias=False)
linear.weight.data = kernel.T.contiguous()
watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(linear))
print(float(watcher.analyze(min_evals=0)["alpha"].iloc[0]))
"""


# Bounds of this library's time / WeightWatcher's.
_BOUNDS = {"fit": 0.1, "whole": 0.5}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    number = commandline.whole_number
    options = {
        "--size": {"type": number, "default": 2048, "help": "of the matrix (2048)"},
        "--repeats": {"type": number, "default": 3, "help": "rounds (3)"},
    }
    what = "Time minimum-KS fits against WeightWatcher."
    return commandline.measured("weightwatcher", what, options, _measure, arguments)


def _measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    shape = options.size, options.size
    kernel = rng.standard_normal(shape, np.float32) / options.size**0.5

    def measured(calls: dict[str, Callable[[], float]]) -> dict[str, Any]:
        alphas = {name: call() for name, call in calls.items()}  # Compiles, too.
        seconds = timing.interleave(calls, options.repeats)
        return {"alphas": alphas, "seconds": seconds}

    yield {"size": options.size, "fit": measured(_fits(kernel))}
    yield {"whole": measured(_wholes(kernel))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.npz"
        np.savez(path, kernel=kernel)
        yield {"process": measured(_processes(path))}


def _fits(kernel: np.ndarray) -> dict[str, Callable[[], float]]:
    """Return ways from eigenvalues to alpha."""
    from weightwatcher import WW_powerlaw

    eigenvalues = np.linalg.svd(kernel.astype(float), compute_uv=False)[::-1] ** 2
    logarithms = jnp.log(jnp.asarray(eigenvalues, jnp.float32))[None]
    valid = jnp.ones(logarithms.shape, bool)
    fit = jax.jit(tb_optax.fit_min_ks())
    return {
        OURS: lambda: float(fit(logarithms, valid).alpha[0]),
        PEER: lambda: float(WW_powerlaw.pl_fit(data=eigenvalues).alpha),
    }


def _wholes(kernel: np.ndarray) -> dict[str, Callable[[], float]]:
    """Return ways from the matrix to alpha."""
    import torch
    import weightwatcher

    layer = tb_optax.Layer("kernel", tb_optax.MatrixAxes((0,), (1,)))
    fit = tb_optax.fit_min_ks()
    analyze = tb_optax.layer_analysis([layer], fit=fit, eigenvalue_floor=1e-5)
    params = {"kernel": jnp.asarray(kernel)}
    linear = torch.nn.Linear(*kernel.shape, bias=False)
    linear.weight.data = torch.from_numpy(kernel.T.copy())
    network = torch.nn.Sequential(linear)

    def published() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            watcher = weightwatcher.WeightWatcher(model=network)
            return float(watcher.analyze(min_evals=0)["alpha"].iloc[0])

    return {
        OURS: lambda: float(analyze(params).alpha[0]),
        PEER: published,
    }


def _processes(path: Path) -> dict[str, Callable[[], float]]:
    """Return ways from a file to alpha, each in a new process."""
    table = path.with_suffix(".json")
    options = ["--fit", "min_ks", "--floor", "1e-5", "--json", table, "--force"]

    def run(*arguments: Any) -> str:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, check=True, text=True
        ).stdout

    def ours() -> float:
        run("-m", "tb_optax", path, *options)
        return json.loads(table.read_text())[0]["alpha"]

    def published() -> float:
        return float(run("-c", _SCRIPT, path).split()[-1])

    return {OURS: ours, PEER: published}


def section(results: Mapping[str, Any]) -> Iterator[str]:
    """Give the section of a file of results."""
    size = results["size"]
    yield from cells.head(f"A {size} x {size} matrix, minimum-KS fit", results)
    names = {
        "fit": "fit, eigenvalues given",
        "whole": "whole analysis",
        "process": "whole process, from a file",
    }
    rows = []
    for part in [part for part in names if part in results]:
        seconds, alphas = results[part]["seconds"], results[part]["alphas"]
        ratio = timing.ratios(seconds[OURS], seconds[PEER])
        what = f"{names[part]}, {OURS} / {PEER}"
        row = cells.against(what, ratio, _BOUNDS.get(part))
        row |= {f"{name}, s": cells.cell(own) for name, own in seconds.items()}
        apart = abs(alphas[OURS] / alphas[PEER] - 1)
        rows.append(row | {"alphas apart": f"{apart:.0e}"})
    yield cells.table(rows)


if __name__ == "__main__":
    sys.exit(main())
