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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tb_optax
from benchmarks import commandline, timing

_SCRIPT = """
import sys
import numpy, torch, weightwatcher
kernel = torch.from_numpy(numpy.load(sys.argv[1])["kernel"])
linear = torch.nn.Linear(*kernel.shape, bias=False)
linear.weight.data = kernel.T.contiguous()
watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(linear))
print(float(watcher.analyze(min_evals=0)["alpha"].iloc[0]))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    description = "Time minimum-KS fits against WeightWatcher."
    return commandline.measured(
        "weightwatcher", description, _add_options, _measure, arguments
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    number = commandline.whole_number
    parser.add_argument("--size", type=number, default=2048, help="of the matrix")
    parser.add_argument("--repeats", type=number, default=3, help="rounds (3)")


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
        "tb_optax": lambda: float(fit(logarithms, valid).alpha[0]),
        "WeightWatcher": lambda: float(WW_powerlaw.pl_fit(data=eigenvalues).alpha),
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
        "tb_optax": lambda: float(analyze(params).alpha[0]),
        "WeightWatcher": published,
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

    return {"tb_optax": ours, "WeightWatcher": published}


if __name__ == "__main__":
    sys.exit(main())
