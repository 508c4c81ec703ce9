"""The command line: look at the spectra of a checkpoint.

    python -m tb_optax model.safetensors

names every leaf with its verdict, analyzes the layers one at a time, and prints a
table. `--help` lists what else it does.
"""

import argparse
import csv
import dataclasses
import fnmatch
import functools
import glob
import importlib
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tb_optax.analysis import LayerAnalysis, assign_multipliers, esd, layer_analysis
from tb_optax.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from tb_optax.checks import optional
from tb_optax.describe import describe
from tb_optax.find import find_layers, read_leaves
from tb_optax.lanczos import exact, quadrature
from tb_optax.layers import Layer, MatrixAxes, expand_stacks
from tb_optax.leaves import leaves_of, listing, natural, shapes_of
from tb_optax.power_law import fit_median, fit_min_ks, fit_peak

FITS = {"median": fit_median(), "min_ks": fit_min_ks(), "peak": fit_peak()}
MIN_EIGENVALUES = 50
MAX_DIM = 16384

# What the table shows of the columns that a row has, with its headings.
HEADINGS = {
    "layer": "layer",
    "shape": "shape",
    "eigenvalue_count": "N",
    "alpha": "alpha",
    "alpha_error": "± at most",
    "random_alpha": "random alpha",
    "ks_distance": "KS",
    "xmin": "xmin",
    "spectral_norm": "spectral norm",
    "stable_rank": "stable rank",
    "multipliers": "multiplier",
}
# 0 in these says that there is none.
OF_A_FIT = ("alpha", "alpha_error", "random_alpha", "ks_distance", "xmin")
COMPARED = {
    "layer": "layer",
    "alpha": "alpha",
    "other_alpha": "other alpha",
    "alpha_change": "change",
    "spectral_norm": "spectral norm",
    "other_spectral_norm": "other",
    "relative_distance": "|other - W| / |W|",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What the command finds in one checkpoint.

    Attributes:
        checkpoint: the file.
        layers: its layers in numeric order, stacks expanded.
        verdicts: a row per leaf: what it is, or why it is no layer.
    """

    checkpoint: Checkpoint
    layers: tuple[Layer, ...]
    verdicts: list[dict[str, Any]]

    def name(self, layer: Layer) -> str:
        """Name a layer as the file does, with its slice."""
        return self.checkpoint.names[layer.path] + layer.name[len(layer.path) :]

    def kernels(self) -> Iterator[tuple[Layer, jax.Array]]:
        """Read the kernels of the layers, one at a time.

        Those of equal shape and axes follow each other.
        """

        def kind(layer):
            name = self.checkpoint.names[layer.path]
            return self.checkpoint.leaves[name].shape, dataclasses.astuple(layer.axes)

        path, leaf = None, None
        for layer in sorted(self.layers, key=kind):
            if layer.path != path:
                path, leaf = layer.path, None  # Before the next is read.
                if not self.has_slice(layer):
                    leaf = self.checkpoint.read(self.checkpoint.names[path])
            yield layer, self.kernel(layer, leaf)

    def has_slice(self, layer: Layer) -> bool:
        """Return whether the kernel of a layer can be read without others."""
        name = self.checkpoint.names[layer.path]
        stored = self.checkpoint.leaves[name].load_slice is not None
        return stored and layer.axes.stacked == tuple(range(len(layer.index)))

    def kernel(self, layer: Layer, leaf: np.ndarray | None = None) -> jax.Array:
        """Read the kernel of one layer, or take it out of its leaf."""
        name = self.checkpoint.names[layer.path]
        if self.has_slice(layer):
            kernel = self.checkpoint.read(name, layer.index)
        else:
            leaf = self.checkpoint.read(name) if leaf is None else leaf
            places = range(len(layer.index))
            kernel = np.moveaxis(leaf, layer.axes.stacked, places)[layer.index]
        # JAX's default float dtype, which `JAX_ENABLE_X64` widens.
        return jnp.asarray(kernel.astype(jnp.zeros(()).dtype, copy=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: as on the command line; None takes those of the process.

    Returns:
        The exit code: 0, or 2 if something is wrong with files or arguments, which
        one line on standard error says.
    """
    given = _parser().parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises.
    try:
        _run(given)
    except (ValueError, OSError, ImportError, jax.errors.JaxRuntimeError) as error:
        print("tb-optax:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _run(given: argparse.Namespace) -> None:
    _check_outputs(given)
    with optional("files"):
        from tabulate import tabulate
    analysis = functools.partial(
        layer_analysis,
        fit=FITS[given.fit],
        eigenvalue_floor=given.floor,
        spectrum=quadrature() if given.quadrature else exact(),
        max_dim=MAX_DIM,
    )
    analysis()  # Raises what is wrong with the arguments now.
    reports = [_report(open_checkpoint(given.checkpoint), given)]
    if given.compare:
        reports.append(_report(open_checkpoint(given.compare), given))
    show = functools.partial(tabulate, headers="keys", disable_numparse=True)
    print(show(reports[0].verdicts))
    spectra: dict[str, np.ndarray] = {}
    rows = _rows(reports[0], analysis, spectra if given.plot else None)
    print("\n" + show(_table(rows, HEADINGS)))
    if given.compare:
        others = _rows(reports[1], analysis, None)
        notes = _compare(reports, rows, others)
        compared = _table([row for row in rows if "other_alpha" in row], COMPARED)
        print("\n" + show(compared))
        print(*notes, sep="\n")
    _write(given, rows)
    if given.plot:
        _plot(given.plot, rows, spectra)


def _axes(text: str) -> tuple[str, MatrixAxes | None]:
    """Parse `PATTERN=AXES`."""
    pattern, _, letters = text.rpartition("=")
    if letters == "none" and pattern:
        return pattern, None
    fields = {"i": [], "o": [], "p": [], "s": []}
    for axis, letter in enumerate(re.sub("[hwd]", "p", letters)):
        fields.setdefault(letter, []).append(axis)
    try:
        if not pattern or len(fields) > 4:
            raise ValueError
        return pattern, MatrixAxes(*map(tuple, fields.values()))
    except ValueError:
        msg = (
            f"{text!r} must be PATTERN=AXES with the letters i, o, h, w, d, s, one for "
            f"each axis, at least one i and one o, or none"
        )
        raise argparse.ArgumentTypeError(msg) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tb-optax",
        description="Analyze the layers of a checkpoint: power-law exponents of their "
        "spectra, and the multipliers that TempBalance would give them.",
        epilog="Multipliers are those of the default map over all layers that are "
        "analyzed and have at least 50 eigenvalues; TempBalance as published leaves "
        "out the first and the last layer.",
    )
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        help="safetensors (one file, or the index of shards), .npz, Flax .msgpack, "
        "an Orbax directory, or a directory that holds one of these",
    )
    add("--fit", choices=FITS, default="median", help="which power law (median)")
    floor = "fit eigenvalues above it only, such as 1e-5"
    add("--floor", type=float, metavar="λ", help=floor)
    add(
        "--layers",
        action="append",
        metavar="PATTERN",
        help="analyze only layers whose names match, as in '*mlp*'; repeatable",
    )
    add(
        "--axes",
        action="append",
        default=[],
        metavar="PATTERN=AXES",
        type=_axes,
        help="how to read leaves whose names match, a letter for each axis: i inputs, "
        "o outputs, h, w, d positions, s stacked layers, as in '*conv*=oihw' (PyTorch) "
        "or hwio (Flax), io, oi, sio; or none, for what is no layer",
    )
    add("--quadrature", action="store_true", help="estimate spectra of large kernels")
    moved = "another checkpoint of the same model: what moved"
    add("--compare", type=Path, metavar="OTHER", help=moved)
    add("--csv", type=Path, metavar="FILE", help="write the table with all columns")
    add("--json", type=Path, metavar="FILE", help="write it as a list of objects")
    add("--plot", type=Path, metavar="DIR", help="write pictures")
    add("--force", action="store_true", help="overwrite files that exist")
    return parser


def _check_outputs(given: argparse.Namespace) -> None:
    """Raise now what would make writing fail at the end."""
    for path in (given.csv, given.json, given.plot):
        if path is not None and path.exists() and not given.force:
            msg = f"{path} exists; pass --force to overwrite it."
            raise ValueError(msg)
        if path is not None and not path.absolute().parent.is_dir():
            msg = f"{path} cannot be written: {path.parent} is no directory."
            raise ValueError(msg)
    if given.plot:
        importlib.import_module("tb_optax.plots")  # Raises without Matplotlib.


# --- which leaves are layers ----------------------------------------------------------


def _report(checkpoint: Checkpoint, given: argparse.Namespace) -> Report:
    """Find the layers of a checkpoint, and say of every leaf what it is."""
    tree = checkpoint.shapes()
    reasons = _reasons(checkpoint, tree, dict(given.axes))
    skipped = {glob.escape(path): None for path in reasons}
    found = find_layers(tree, axes={**dict(given.axes), **skipped})
    patterns, kept = given.layers or ["*"], []
    for layer in found:
        name = checkpoint.names[layer.path]
        if layer.path in reasons:
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            kept.append(layer)
        else:
            reasons[layer.path] = "left out by --layers"
    if not kept:
        unclear = sum(reason.startswith("UNCLEAR") for reason in reasons.values())
        names = listing(checkpoint.names[layer.path] for layer in found)
        msg = (
            f"{checkpoint.path} has no layer to analyze: of {len(checkpoint.leaves)} "
            f"leaves {unclear} are unclear (see --axes); layers are {names or 'none'}."
        )
        raise CheckpointError(msg)
    layers = expand_stacks(kept, shapes_of(leaves_of(tree)))
    layers = sorted(layers, key=lambda layer: (natural(layer.path), layer.index))
    report = Report(checkpoint, tuple(layers), _verdicts(checkpoint, kept, reasons))
    if not given.quadrature:
        _check_size(report)
    return report


def _reasons(
    checkpoint: Checkpoint, tree: Any, axes: Mapping[str, MatrixAxes | None]
) -> dict[str, str]:
    """Say why leaves are left out, by path: what the rules of `find_layers` do not.

    Where a file has leaves under `params`, others such as the moments of Adam are out.
    """
    leaves = leaves_of(tree)
    has_params = any(path.startswith("params/") for path in leaves)
    reasons = {}
    for path, reading in read_leaves(leaves, axes).items():
        if leaves[path].value is None:
            problem = checkpoint.leaves[checkpoint.names[path]].problem
            reasons[path] = problem or "it holds no numbers"
        elif has_params and not path.startswith("params/"):
            reasons[path] = "outside of params"
        elif reading.unclear:
            reasons[path] = f"UNCLEAR: {reading.reason}; pass --axes"
    return reasons


def _verdicts(
    checkpoint: Checkpoint, layers: Sequence[Layer], reasons: Mapping[str, str]
) -> list[dict[str, Any]]:
    rows = []
    for row in describe(checkpoint.shapes(), layers, min_eigenvalues=MIN_EIGENVALUES):
        leaf = checkpoint.leaves[checkpoint.names[row["leaf"]]]
        verdict = row["note"].partition(": no layer names it")[0]
        if verdict == "follows":
            verdict = f"follows {row['layer']}"
        rows.append(
            {
                "leaf": checkpoint.names[row["leaf"]],
                "shape": _times(leaf.shape),
                "dtype": "" if leaf.dtype is None else leaf.dtype.name,
                "verdict": reasons.get(row["leaf"], verdict),
            }
        )
    return sorted(rows, key=lambda row: natural(row["leaf"]))


def _check_size(report: Report) -> None:
    """Raise CheckpointError if a matrix is too large to be decomposed."""
    for layer in report.layers:
        leaf = report.checkpoint.leaves[report.checkpoint.names[layer.path]]
        side = min(layer.matrix_shape(leaf.shape))
        if side > MAX_DIM:
            msg = (
                f"{report.name(layer)!r} has matrices of smaller side {side}, above "
                f"{MAX_DIM}: pass --quadrature, or leave it out by --layers or "
                f"--axes NAME=none."
            )
            raise CheckpointError(msg)


# --- analysis -------------------------------------------------------------------------


def _rows(
    report: Report,
    analysis: functools.partial[LayerAnalysis],
    spectra: dict[str, np.ndarray] | None,
) -> list[dict[str, Any]]:
    """Analyze layer by layer; fill in `spectra` if it is given.

    Layers of equal shape and axes share a compiled program. It is freed after them:
    those of sixty shapes would take more memory than most kernels.
    """
    with optional("files"):
        from tqdm import tqdm

    rows, compiled = {}, None
    with tqdm(total=len(report.layers), unit="layer", disable=None) as progress:
        for layer, kernel in report.kernels():
            alone, params = Layer("kernel", _plain(layer.axes)), {"kernel": kernel}
            if compiled != (kernel.shape, alone):
                jax.clear_caches()
                compiled = kernel.shape, alone
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "no layer reaches|only one layer")
                (row,) = analysis([alone])(params).rows()
            name, sides = report.name(layer), sorted(alone.matrix_shape(kernel.shape))
            row |= {"layer": name, "shape": kernel.shape, "aspect": sides[0] / sides[1]}
            rows[name] = row
            if spectra is not None and sides[0] <= analysis.keywords["spectrum"].above:
                (spectra[name],) = esd(params, [alone])
            progress.update()
            del kernel, params  # Before the next is read.
    ordered = [rows[report.name(layer)] for layer in report.layers]
    _assign(ordered)
    return ordered


def _plain(axes: MatrixAxes) -> MatrixAxes:
    """Return the axes of a slice of a stack."""
    kept = [axis for axis in range(axes.rank) if axis not in axes.stacked]
    fields = (axes.reduction, axes.output, axes.pooled)
    return MatrixAxes(*(tuple(map(kept.index, field)) for field in fields))


def _assign(rows: list[dict[str, Any]]) -> None:
    """Fill in the multipliers of the default map over all rows."""
    names = ("alpha", "fitted", "eigenvalue_count")
    alpha, fitted, count = (jnp.asarray([row[c] for row in rows]) for c in names)
    options = layer_analysis(min_eigenvalues=MIN_EIGENVALUES).options
    found = assign_multipliers(alpha, fitted, count, options, ())
    for row, multiplier, is_tuned in zip(rows, *found, strict=True):
        row["multipliers"], row["tuned"] = float(multiplier), bool(is_tuned)


def _compare(
    reports: Sequence[Report], rows: list[dict[str, Any]], others: list[dict[str, Any]]
) -> list[str]:
    """Join to the rows what moved, and say which layers one file alone has."""
    first, second = ({row["layer"]: row for row in table} for table in (rows, others))
    for layer, kernel in reports[0].kernels():
        name = reports[0].name(layer)
        if name not in second:
            continue
        if second[name]["shape"] != first[name]["shape"]:
            shapes = f"{first[name]['shape']} and {second[name]['shape']}"
            msg = f"{name!r} has shapes {shapes}: two checkpoints of one model?"
            raise CheckpointError(msg)
        norm = jnp.linalg.norm(kernel)
        moved = jnp.linalg.norm(reports[1].kernel(layer) - kernel)
        row, other = first[name], second[name]
        both = row["fitted"] and other["fitted"]
        row |= {
            "other_alpha": other["alpha"],
            "other_spectral_norm": other["spectral_norm"],
            "alpha_change": other["alpha"] - row["alpha"] if both else math.nan,
            "relative_distance": float(moved / norm) if norm > 0 else math.nan,
        }
    alone = (first.keys() - second.keys(), second.keys() - first.keys())
    return [
        f"only in {report.checkpoint.path}: {listing(sorted(names))}"
        for report, names in zip(reports, alone, strict=True)
        if names
    ]


# --- output ---------------------------------------------------------------------------


def _table(
    rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str]
) -> list[dict[str, str]]:
    """Format rows, and the mean of those that are fitted."""
    columns = [column for column in headings if rows and column in rows[0]]
    table = [{headings[c]: _text(c, row[c]) for c in columns} for row in rows]
    fitted = [row for row in rows if row["fitted"]]
    if fitted:
        mean: dict[str, Any] = {
            column: float(np.mean([row[column] for row in fitted]))
            for column in columns
            if column not in ("layer", "shape")
        }
        mean |= {"layer": f"mean of {len(fitted)} fitted of {len(rows)}", "shape": ""}
        table.append({headings[c]: _text(c, mean[c]) for c in columns})
    return table


def _text(column: str, value: Any) -> str:
    if isinstance(value, tuple):
        return _times(value)
    if isinstance(value, str | int):
        return str(value)
    if column in OF_A_FIT and value == 0:
        return "-"
    if column in ("eigenvalue_count", "stable_rank"):
        return f"{value:.1f}"
    return f"{value:.3g}" if column == "xmin" else f"{value:.3f}"


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _write(given: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows; what is not finite is left empty, null in JSON."""

    def plain(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    hidden = ("shape", "aspect")
    rows = [{c: plain(row[c]) for c in row if c not in hidden} for row in rows]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    if given.csv:
        columns = dict.fromkeys(column for row in rows for column in row)
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def _plot(
    directory: Path,
    rows: Sequence[Mapping[str, Any]],
    spectra: Mapping[str, np.ndarray],
) -> None:
    """Write a picture of all layers, and one of each spectrum."""
    from tb_optax import plots

    directory.mkdir(parents=True, exist_ok=True)
    plots.layers(rows).savefig(directory / "layers.png", dpi=150)
    for row in rows:
        values = spectra.get(row["layer"], np.zeros(0))
        if np.any(values > 0):
            figure = plots.spectrum(values, row, aspect=row["aspect"])
            name = re.sub(r"[^\w.\[\]-]", ".", row["layer"])
            figure.savefig(directory / f"spectrum-{name}.png", dpi=100)
    left = len(rows) - len(spectra)
    more = f"; {left} spectra of large kernels are not drawn" if left else ""
    print(f"\npictures in {directory}{more}")


if __name__ == "__main__":
    sys.exit(main())
