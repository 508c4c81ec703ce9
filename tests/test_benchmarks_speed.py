"""The measuring commands: what they write, how they fail, and their tables."""

import json
import math
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from runs import assert_fails

from benchmarks import (
    cells,
    commandline,
    machine,
    models,
    peers,
    spectral,
    step_cost,
    tables,
    timing,
)
from benchmarks.networks import networks, of_model

ROOT = Path(__file__).parents[1]
TINY = ["--repeats", "1"]


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    """Processes compile quickly too, and what a command sets is put back."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "wrn16_8"])
def test_kernels_are_those_of_the_model(name):
    """Whose numbers of parameters are the published ones: see the tests of models."""
    model = nnx.eval_shape(
        lambda: models.build(name, num_classes=100, width=0.25, rngs=nnx.Rngs(0))
    )
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    kernels = [leaf.shape for leaf in leaves if leaf.ndim > 1]
    assert sorted(of_model(name, width=0.25).values()) == sorted(kernels)


def test_bottlenecks_have_the_published_number_of_parameters():
    network = networks()["resnet152"]
    # A norm's scale and bias per channel, and the bias of the head.
    norms = sum(2 * shape[3] for shape in network.shapes.values() if len(shape) == 4)
    assert network.size + norms + 1000 == 60_192_808


def test_transformers_have_the_published_numbers_of_parameters():
    biases, norms = 12 * (4 * 768 + 5 * 768), 25 * 2 * 768
    vision = networks()["vit_b16"].size + biases + norms
    assert vision + 768 + 197 * 768 + 768 + 1000 == 86_567_656
    language = networks()["gpt2"].size + biases + norms
    assert language + (50_257 + 1024) * 768 == 124_439_808


def test_the_other_networks_are_those_that_are_named():
    assert networks()["llm_block"].size == 4 * 4096**2 + 3 * 4096 * 11008
    convolutions = {"wrn16x8": 16, "wrn28x6": 28, "resnet34": 36, "vgg16": 13}
    for name, count in convolutions.items():
        assert len(networks()[name].layers) == count + 1
    assert networks()["resnet18"].matrices == 157


def test_kernels_come_from_the_seed_alone():
    network = networks()["tiny"]
    first, again, other = network.params(1), network.params(1), network.params(2)
    for path, shape in network.shapes.items():
        kernel = np.asarray(first[path])
        assert kernel.shape == shape
        np.testing.assert_array_equal(kernel, again[path])
        assert not np.array_equal(kernel, other[path])
        assert abs(kernel.std() * math.prod(shape[:-1]) ** 0.5 - 1) < 0.2


def test_functions_are_called_in_turn_and_the_first_round_is_not_counted():
    calls, prepared = [], []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = timing.interleave(functions, 2, before=prepared.append)
    assert "".join(calls) == "".join(prepared) == "abcabcabc"
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys(
        "abc", 2
    )


def test_a_budget_ends_the_rounds_but_the_first(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    # A round takes 3 of the clock: start, stop, and the look at the budget.
    assert len(timing.interleave({"a": int}, 100, budget=0.5)["a"]) == 1
    assert len(timing.interleave({"a": int}, 100, budget=8)["a"]) == 2


def test_ratios_are_of_one_round():
    assert timing.ratios([1.0, 6.0], [2.0, 3.0]) == [0.5, 2.0]
    assert cells.cell([3.0, 1.0, 2.0]) == "2.00 [1.00, 3.00]"


def test_spectral_writes_every_part(tmp_path):
    out = tmp_path / "new" / "spectral.json"
    assert spectral.main(["--nets", "tiny", *TINY, "--out", str(out)]) == 0
    results = json.loads(out.read_bytes())
    # No command sets a variable that a library reads its number of threads from.
    assert results["threads"] == {
        name: os.environ[name]
        for name in machine.THREAD_VARIABLES
        if name in os.environ
    }
    assert results["versions"]["jax"]
    net = results["analysis"]["tiny"]
    assert peers.OURS in net["seconds"]
    assert set(net["seconds"]) | set(net["missing"]) == {peers.OURS, peers.TORCH}
    assert all(len(samples) == 1 for samples in net["seconds"].values())
    # Other ways to the same alphas, to float32 and the width of these spectra.
    assert max(net["alpha_difference"].values()) < 1e-4
    assert results["compilation"]["tiny"]["temporary_bytes"][0] > 0
    rendered = tables.render(out.parent)
    assert "Compilation, each in a new process" in rendered
    assert "Not measured: `python -m benchmarks.step_cost`" in rendered


def test_a_missing_peer_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    out = tmp_path / "spectral.json"
    arguments = ["--nets", "tiny", *TINY, "--parts", "analysis", "--out", str(out)]
    assert spectral.main(arguments) == 0
    assert f"without {peers.TORCH}: " in capsys.readouterr().err
    net = json.loads(out.read_bytes())["analysis"]["tiny"]
    assert list(net["missing"]) == [peers.TORCH]
    assert set(net["seconds"]) == {peers.OURS}
    assert "torch" in tables.render(tmp_path)


@pytest.mark.parametrize("title", [peers.OURS, peers.TORCH])
def test_every_way_finds_the_alpha_of_the_reference(title):
    if title == peers.TORCH:
        pytest.importorskip("torch", reason="the peer is an extra of its own")
    network = networks()["tiny"]
    params = network.params()
    expected = []
    for kernel in params.values():
        matrices = np.asarray(kernel, float).reshape(-1, *kernel.shape[-2:])
        values = np.sort(np.linalg.svd(matrices, compute_uv=False).ravel() ** 2)
        tail = np.log(values[len(values) // 2 :])
        expected.append(1 + len(tail) / (tail.sum() - len(tail) * tail[0]))
    found = peers.ways(network)[title](network, params)()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_step_cost_writes_every_part(tmp_path):
    out = tmp_path / "step_cost.json"
    arguments = ["--batch", "2", "--side", "4", "--interval", "21", "--cycles", "2"]
    arguments += ["--model", "resnet4", "--width", "0.5"]
    assert step_cost.main([*arguments, "--repeats", "2", "--out", str(out)]) == 0
    results = json.loads(out.read_bytes())
    assert set(results["step"]) == {"without", "interval=None", "plain"}
    assert set(results["refresh"]) == {"without", "refresh", "analysis"}
    for cycles in results["cycle"].values():
        assert np.shape(cycles) == (2, 21)
    assert set(results["cycle"]) == {"without", "plain", "spread"}
    assert results["memory"]["plain"] >= results["memory"]["without"] > 0
    assert "slowest of 21 positions / median one, spread" in tables.render(tmp_path)


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (spectral.main, "--parts all", "--parts 'all' analysis"),
        (spectral.main, "--parts analysis analysis", "--parts twice"),
        (spectral.main, "--nets resnet19", "--nets 'resnet19' resnet18"),
        (spectral.main, "--repeats 0", "--repeats"),
        (spectral.main, "--repeats many", "--repeats"),
        (spectral.main, "--budget nan", "--budget"),
        (spectral.main, "--unknown", "--unknown"),
        (step_cost.main, "--model resnet19", "--model 'resnet19' resnet18"),
        (step_cost.main, "--interval 0", "--interval"),
        (step_cost.main, "--width inf", "--width"),
        (step_cost.main, "--dtype float16", "--dtype"),
        (step_cost.main, "--cycles 0", "--cycles"),
    ],
)
def test_faults_of_the_arguments(main, arguments, words, tmp_path, capsys):
    out = tmp_path / "out.json"
    given = [*arguments.split(), "--out", str(out)]
    assert_fails(main, capsys, given, *words.split())
    assert not out.exists()


@pytest.mark.parametrize("main", [spectral.main, step_cost.main])
def test_results_are_overwritten_only_when_asked(main, tmp_path, capsys):
    out = tmp_path / "results.json"
    out.write_text("old")
    assert_fails(main, capsys, ["--out", str(out)], "results.json", "--force")
    assert_fails(main, capsys, ["--out", str(tmp_path), "--force"], "directory")
    assert out.read_text() == "old"


def test_damaged_results_are_named(tmp_path, capsys):
    (tmp_path / "spectral.json").write_text("{")
    readme = tmp_path / "README.md"
    arguments = ["--results", str(tmp_path), "--out", str(readme)]
    assert_fails(tables.main, capsys, arguments, "spectral.json", "damaged")
    assert not readme.exists()


def test_tables_are_checked_against_the_results(tmp_path, capsys):
    readme = tmp_path / "README.md"
    arguments = ["--results", str(tmp_path), "--out", str(readme)]
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0
    readme.write_text(readme.read_text() + "Faster than light.\n")
    assert_fails(tables.main, capsys, [*arguments, "--check"], "out of date")


def test_readme_is_generated_from_the_results():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert text == tables.render(commandline.RESULTS)
    for path in tables.ANSWERS:
        text = path.read_text(encoding="utf-8")
        assert text == tables.answered(path, commandline.RESULTS)
