"""The grids: well-formed, as published, and each ablation changes what it says."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import reference
from flax import nnx
from runs import TINY, record

from benchmarks import models
from benchmarks.arms import ARMS
from benchmarks.configs import CIFAR10
from benchmarks.grids import GRIDS
from benchmarks.loop import balanced_layers
from benchmarks.models.families import Plan, ResNet
from benchmarks.published import PAIRS, settings
from benchmarks.train import main, parse

CONFIGS = {
    (grid, name): config
    for grid in GRIDS
    for name, config in GRIDS[grid].configs().items()
}
# Whether the multipliers at initialization change from variant to variant.
BALANCING = ("metric", "fit", "bounds", "norms", "ends")
ABLATIONS = ("learning-rate", "width", "interval", *BALANCING)


@pytest.mark.parametrize("grid", GRIDS)
def test_variants_set_what_they_name_and_nothing_else(grid):
    base, variants = GRIDS[grid].base, GRIDS[grid].variants
    configs = GRIDS[grid].configs()
    assert list(configs) == list(variants)
    assert len(set(configs.values())) == len(configs)
    for name, config in configs.items():
        given = dataclasses.asdict(base)
        set_otherwise = {
            field: value
            for field, value in dataclasses.asdict(config).items()
            if value != given[field]
        }
        assert set_otherwise == variants[name]


def test_names_can_be_those_of_directories():
    for names in CONFIGS:
        for name in names:
            # Lower case alone: some file systems do not tell the cases apart.
            assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name)


def test_every_published_pair_is_compared_as_published():
    compared = {}
    for config in CONFIGS.values():
        if "tb_snr" in config.arms:
            compared[config.dataset, config.model] = config
    assert set(compared) == set(PAIRS)
    for config in compared.values():
        recipe = (config.epochs, config.batch_size, config.weight_decay, config.width)
        assert recipe == (200, 128, 5e-4, 1)
        assert (config.momentum, config.init, config.subset) == (0.9, "torch", None)


def test_ablations_start_from_the_published_numbers():
    for grid in ABLATIONS:
        base = GRIDS[grid].base
        assert (base.dataset, base.model) == ("cifar100", "resnet18")
        assert settings(base, "tb") == (0.1, 0.01, 0.5, 1.5)
        # One variant at least is the base, by its numbers.
        numbers = dataclasses.replace(base, learning_rate=0.1)
        assert {base, numbers} & set(GRIDS[grid].configs().values())


def test_numbers_of_the_ablations():
    rates = GRIDS["learning-rate"].configs().values()
    for arm in ("cal", "tb"):
        given = [settings(config, arm).learning_rate for config in rates]
        first = [np.asarray(ARMS[arm].schedule(CIFAR10, 1, rate)(0)) for rate in given]
        np.testing.assert_allclose(first, [0.05, 0.1, 0.15], rtol=1e-6)
    for name, config in GRIDS["bounds"].configs().items():
        numbers = settings(config, "tb")
        assert name == f"low{numbers.low}-high{numbers.high}"
    for name, config in GRIDS["interval"].configs().items():
        assert name == f"interval{config.interval}"
    channels = []
    for config in GRIDS["width"].configs().values():
        model = nnx.eval_shape(lambda config=config: resnet18(config.width))
        channels.append(leaves(model)["blocks/7/conv2/kernel"].shape[-1])
    assert channels == [256, 512, 768]


def resnet18(width):
    return models.build("resnet18", num_classes=100, width=width, rngs=nnx.Rngs(3))


def leaves(model):
    return by_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def by_path(tree):
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def small():
    """A net of two blocks, whose head has enough eigenvalues to be tuned."""
    return ResNet(Plan((64,), (2,), 3, 100, nnx.Rngs(3)))


@pytest.fixture(scope="module")
def multipliers():
    """The multipliers of all leaves of a small net, by grid, variant and path."""

    @functools.cache
    def multipliers(config):
        model = small()
        analyze = ARMS["tb"].analysis(config, balanced_layers(model, config), 0)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        tree = analyze(params).leaf_multipliers(params)
        return by_path(jax.tree.map(float, tree))

    return {
        grid: {
            name: multipliers(config) for name, config in GRIDS[grid].configs().items()
        }
        for grid in BALANCING
    }


@pytest.mark.parametrize("grid", BALANCING)
def test_every_variant_has_multipliers_of_its_own(multipliers, grid):
    table = [list(own.values()) for own in multipliers[grid].values()]
    assert len(np.unique(np.round(table, 4), axis=0)) == len(table)


def expected(config):
    """The multipliers of the kernels, by the independent statement of the method."""
    model = small()
    kernels = leaves(model)
    paths = [layer.path for layer in models.layers_in_order(model)]
    fit = {
        "median": reference.fit_median,
        "min_ks": reference.fit_min_ks,
        "peak": reference.fit_peak,
    }[config.fit]
    score = {
        "alpha": lambda spectrum: fit(spectrum).alpha,
        "alpha_hat": lambda spectrum: fit(spectrum).alpha * np.log10(spectrum[-1]),
        "spectral_norm": lambda spectrum: spectrum[-1],
    }[config.metric]
    # Inputs and outputs come last in Flax, and first in PyTorch.
    spectra = [reference.spectrum(np.asarray(kernels[path]).T) for path in paths]
    kept = reference.select(
        [len(spectrum) for spectrum in spectra],
        first=not config.ends,
        last=not config.ends,
        threshold=50,
    )
    scores = np.full(len(paths), np.nan)
    for i in np.flatnonzero(kept):
        scores[i] = score(spectra[i])
    numbers = settings(config, "tb")
    values = reference.multipliers(scores, "tb_linear_map", numbers.low, numbers.high)
    return dict(zip(paths, values, strict=True))


@pytest.mark.parametrize(
    ("grid", "name"), [key for key in CONFIGS if key[0] in BALANCING]
)
def test_kernels_have_the_multipliers_of_an_independent_statement(
    multipliers, grid, name
):
    for path, multiplier in expected(CONFIGS[grid, name]).items():
        assert multipliers[grid][name][path] == pytest.approx(multiplier, abs=2e-4)


def test_norms_follow_their_layer_or_keep_multiplier_1(multipliers):
    follow, alone = multipliers["norms"]["follow"], multipliers["norms"]["alone"]
    norms = [path for path in follow if path.endswith("scale")]
    assert len(norms) == 5
    assert follow["blocks/1/bn1/scale"] == follow["blocks/1/conv1/kernel"] != 1
    for path in follow:
        of_norm = path.endswith("scale") or "/bn" in f"/{path}"
        assert alone[path] == (1 if of_norm else follow[path])


def test_the_ends_are_left_out_or_balanced(multipliers):
    out, kept = multipliers["ends"]["left-out"], multipliers["ends"]["kept-in"]
    # The stem is too small to be tuned.
    for stem in ("conv1/kernel", "bn1/scale", "bn1/bias"):
        assert out[stem] == kept[stem] == 1
    assert out["linear/kernel"] == out["linear/bias"] == 1
    assert kept["linear/kernel"] == kept["linear/bias"] != 1


def test_a_run_with_every_choice_made_otherwise(tmp_path):
    chosen = "--metric spectral_norm --fit peak --no-norms --ends --interval 2"
    arguments = [*TINY, *chosen.split(), "--arms", "tb", "--no-plots"]
    config = parse(arguments).config
    assert (config.metric, config.fit) == ("spectral_norm", "peak")
    assert (config.norms, config.ends, config.interval) == (False, True, 2)
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    written = record(tmp_path / "tb")
    expected = dataclasses.asdict(config) | {"arm": "tb"}
    assert written["config"].items() <= expected.items()
    rows = written["layers"]
    # Before the first and the third epoch, and after the last.
    assert {row["epoch"] for row in rows} == {0, 2, 3}
    names = [row["layer"] for row in rows if row["epoch"] == 0]
    assert (names[0], names[-1]) == ("conv1", "linear")
    for epoch in (0, 2, 3):
        tuned = [row for row in rows if row["epoch"] == epoch and row["tuned"]]
        largest = np.array([row["spectral_norm"] for row in tuned]) ** 2
        np.testing.assert_allclose(
            [row["multiplier"] for row in tuned],
            np.interp(largest, [largest.min(), largest.max()], [0.5, 1.5]),
            rtol=1e-4,
        )
