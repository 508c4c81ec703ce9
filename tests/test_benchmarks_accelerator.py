"""`benchmarks.accelerator` at toy sizes, and what it may import."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest
from runs import assert_fails

from benchmarks import accelerator

ROOT = pathlib.Path(__file__).parents[1]
# What a machine without internet has; `torch` is a peer that may be missing.
ALLOWED = {
    *("jax", "flax", "optax", "numpy", "scipy", "pandas", "pyarrow", "PIL", "tqdm"),
    *("tabulate", "jaxtyping", "orbax", "torch", "benchmarks", "tb_optax"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The directory of a whole run."""
    out = tmp_path_factory.mktemp("accelerator") / "out"
    assert accelerator.main(["--minutes", "1", "--out", str(out)]) == 0
    return out


@pytest.mark.long
def test_every_part_writes_a_file_of_its_own(measured):
    files = sorted(path.name for path in measured.iterdir())
    assert files == sorted(f"{part}.json" for part in accelerator.PARTS)
    assert all(path.stat().st_size < 2**20 for path in measured.iterdir())
    figures = {
        part: json.loads((measured / f"{part}.json").read_text())["figures"]
        for part in accelerator.PARTS
    }
    assert all(figures.values())
    for network in figures["parity"]["median"].values():
        assert network["alpha / allowed"] < 1
    for figure in figures["candidates"].values():
        # Ways with little accuracy at toy sizes are tested elsewhere.
        assert "left_out" in figure or figure["error"] < 0.2
    for key, figure in figures["candidates"].items():
        if key.endswith(("tb_optax", "eigvalsh", "bisection", "svd")):
            assert figure["error"] < 1e-4


@pytest.mark.long
def test_the_tables_name_every_figure(measured, capsys):
    text = "\n".join(accelerator.sections(measured))
    words = ("alpha / allowed", "Householder in JAX", "images per second", "quadrature")
    for word in words:
        assert word in text
    assert capsys.readouterr().out == ""


@pytest.mark.long
def test_a_run_is_resumed_and_nothing_is_overwritten(measured, capsys):
    before = {path: path.read_text() for path in measured.iterdir()}
    command = ["--minutes", "1", "--out", str(measured)]
    assert_fails(accelerator.main, capsys, command, "--resume continues it")
    content = json.loads((measured / "candidates.json").read_text())
    dropped = next(iter(content["figures"]))
    del content["figures"][dropped]
    (measured / "candidates.json").write_text(json.dumps(content))
    assert accelerator.main([*command, "--resume"]) == 0
    again = json.loads((measured / "candidates.json").read_text())["figures"]
    old = json.loads(before[measured / "candidates.json"])["figures"]
    assert dropped in again
    assert again | {dropped: old[dropped]} == old


@pytest.mark.parametrize("text", ["{", "[]", '{"figures": 1}', "{}"])
def test_a_damaged_file_is_one_line(tmp_path, capsys, text):
    (tmp_path / "parity.json").write_text(text)
    command = ["--minutes", "1", "--out", str(tmp_path), "--resume"]
    assert_fails(accelerator.main, capsys, command, "parity.json is damaged")


@pytest.mark.long
def test_another_machine_needs_another_directory(measured, tmp_path, capsys):
    content = json.loads((measured / "parity.json").read_text())
    content["hardware"]["device"] = "another"
    (tmp_path / "parity.json").write_text(json.dumps(content))
    command = ["--minutes", "1", "--out", str(tmp_path), "--resume"]
    assert_fails(accelerator.main, capsys, command, "another directory")


def test_only_what_an_offline_machine_has_is_imported():
    """Every import statement of every module of ours that is loaded, nested or not."""
    program = (
        "import benchmarks.accelerator, sys;"
        "print(*(m.__file__ for n, m in sys.modules.items()"
        " if n.split('.')[0] in ('benchmarks', 'tb_optax')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    files = run.stdout.split()
    assert len(files) > 20
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(pathlib.Path(file).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported.add(str(node.module).split(".")[0])
    assert imported - ALLOWED - set(sys.stdlib_module_names) == set()
