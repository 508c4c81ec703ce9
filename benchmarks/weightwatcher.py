"""Time a minimum-KS fit, and a whole analysis, against WeightWatcher.

    pip install weightwatcher torch
    python -m benchmarks.weightwatcher

One Gaussian matrix; both fit a power law at every eigenvalue and keep the one with the
smallest Kolmogorov-Smirnov distance. Samples are taken in turn. Faults of the arguments
are one line on stderr and exit code 2.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import tb_optax
from benchmarks import commandline, machine, timing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return commandline.guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    commandline.check_output(options.out, force=options.force)
    machine.bind_cores(options.cores)
    rng = np.random.default_rng(0)
    shape = options.size, options.size
    kernel = rng.standard_normal(shape, np.float32) / options.size**0.5
    parts = {"fit": _fits(kernel), "whole": _wholes(kernel)}
    given = sys.argv[1:] if arguments is None else list(arguments)
    results = machine.describe("benchmarks.weightwatcher", given)
    results["size"] = options.size
    for part, calls in parts.items():
        alphas = {name: call() for name, call in calls.items()}  # Compiles, too.
        results[part] = {
            "alphas": alphas,
            "seconds": timing.interleave(calls, options.repeats),
        }
        commandline.write_results(options.out, results)
    print(options.out)


def _parser() -> argparse.ArgumentParser:
    parser = commandline.Parser(
        prog="python -m benchmarks.weightwatcher",
        description="Time minimum-KS fits against WeightWatcher.",
        allow_abbrev=False,
    )
    number = commandline.whole_number
    parser.add_argument("--size", type=number, default=2048, help="of the matrix")
    parser.add_argument("--repeats", type=number, default=3, help="rounds (3)")
    commandline.add_output(parser, "weightwatcher.json")
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
