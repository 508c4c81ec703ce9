"""The arms: two steps of each, the controls, the published numbers, SGDR's rates."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import eight_images

import tb_optax
from benchmarks import arms, configs, loop
from benchmarks.controls import shuffled
from benchmarks.published import settings

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(*shape, seed):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


SHAPES = ((16, 64), (64, 64), (64, 72), (72, 96), (96, 10))


def network(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x


def tiny():
    return [
        {
            "kernel": normal(*shape, seed=shape[1]) / shape[0] ** 0.5,
            "bias": 0.1 * normal(shape[1], seed=7),
        }
        for shape in SHAPES
    ]


@pytest.fixture(scope="module")
def two_steps(quick_compilation):
    """Of each arm: the first analysis, the first updates, the weights in the end."""
    del quick_compilation
    config = dataclasses.replace(configs.DIGITS, epochs=2)
    inputs = normal(8, 16, seed=0)
    layers = tb_optax.trace_layers(network, tiny(), inputs)[1:-1]
    gradient_fn = jax.jit(
        jax.grad(lambda params: jnp.mean((network(params, inputs) - 0.5) ** 2))
    )
    results = {}
    for name, arm in arms.ARMS.items():
        analyze = arm.analysis(config, layers, config.seed)
        optimizer = arm.build(config, analyze, 1, config.seed)
        update, params = jax.jit(optimizer.update), tiny()
        state, analysis, first = optimizer.init(params), None, None
        if arm.balanced:
            analysis = analyze(params)
            state = tb_optax.set_multipliers(state, analysis)
        for _ in range(2):
            updates, state = update(gradient_fn(params), state, params)
            params = optax.apply_updates(params, updates)
            first = first or updates
        results[name] = analysis, first, params
    return results


@pytest.mark.parametrize("name", arms.ARMS)
def test_two_steps_of_every_arm_are_finite(two_steps, name):
    _, _, params = two_steps[name]
    for before, after in zip(
        jax.tree.leaves(tiny()), jax.tree.leaves(params), strict=True
    ):
        assert np.isfinite(after).all()
        assert not np.array_equal(before, after)


def test_the_mean_matched_control_scales_all_of_cosine_sgd(two_steps):
    balanced, analysis = two_steps["tb"][0], two_steps["mean"][0]
    mean = np.mean(np.asarray(balanced.multipliers)[np.asarray(balanced.tuned)])
    np.testing.assert_allclose(analysis.multipliers, mean, rtol=1e-6)
    assert mean != 1
    for plain, scaled in zip(
        jax.tree.leaves(two_steps["cal"][1]),
        jax.tree.leaves(two_steps["mean"][1]),
        strict=True,
    ):
        np.testing.assert_allclose(scaled, mean * plain, rtol=1e-5)


def test_the_shuffled_control_permutes_the_multipliers(two_steps):
    balanced, analysis = two_steps["tb"][0], two_steps["shuffled"][0]
    np.testing.assert_array_equal(
        np.sort(analysis.multipliers), np.sort(balanced.multipliers)
    )


def test_only_tuned_layers_are_shuffled():
    def analyze(params) -> Any:
        del params
        return Table(tuple("abcdef"), multipliers, tuned)

    tuned = jnp.array([True, False, True, True, False, True])
    multipliers = jnp.array([0.5, 1.0, 0.8, 1.2, 1.0, 1.5])
    dealt = np.array([shuffled(analyze, seed)(()).multipliers for seed in range(20)])
    np.testing.assert_array_equal(dealt[:, ~np.asarray(tuned)], 1)
    np.testing.assert_array_equal(np.sort(dealt), [np.sort(multipliers)] * 20)
    assert len(np.unique(dealt, axis=0)) > 5
    np.testing.assert_array_equal(shuffled(analyze, 3)(()).multipliers, dealt[3])


@dataclasses.dataclass(frozen=True)
class Table:
    """What a control sees of an analysis."""

    layers: tuple[str, ...]
    multipliers: jax.Array
    tuned: jax.Array


def test_lookahead_trains_with_donated_states():
    dataset = eight_images()
    images, labels = dataset.train_images, dataset.train_labels
    config = dataclasses.replace(
        configs.DIGITS, model="resnet8", width=0.25, epochs=2, batch_size=4
    )
    program = loop.make_program(config, arms.ARMS["lookahead"], dataset)
    start = program.start(config.seed)
    [(_, scores)] = program.train((start,), images, labels, jnp.int32(0))
    assert np.isfinite(scores.loss)


def test_numbers_are_the_published_ones():
    def numbers(arm, model="resnet18", dataset="cifar10", **given):
        base = dataclasses.replace(
            configs.CIFAR10, model=model, dataset=dataset, **given
        )
        return dataclasses.astuple(settings(base, arm))

    assert numbers("cal") == (0.1, 0.001, 0.5, 1.5)
    assert numbers("tb", "vgg16") == (0.05, 0.005, 0.5, 1.5)
    assert numbers("tb_snr", "resnet34", "cifar100") == (0.1, 0.005, 0.6, 1.4)
    assert numbers("snr", "vgg19", "cifar100") == (0.05, 0.01, 0.5, 1.5)
    assert numbers("cal", "wrn28_6", "tiny_imagenet")[0] == 0.05
    assert numbers("tb", "wrn28_6", "tiny_imagenet") == (0.1, 1e-4, 0.6, 1.4)
    assert [numbers(arm)[0] for arm in ("lars", "lamb", "adamw")] == [28, 0.01, 0.001]
    assert [numbers(arm, "resnet34")[0] for arm in ("lars", "lookahead", "sgdr")] == [
        32,
        0.15,
        0.05,
    ]
    given = {"learning_rate": 0.2, "snr": 0.3, "low": 0.4, "high": 2.0}
    assert numbers("tb_snr", **given) == (0.2, 0.3, 0.4, 2.0)


def test_sgdr_restarts_at_half_of_the_epochs():
    config = dataclasses.replace(configs.CIFAR10, epochs=200)
    rates = arms.ARMS["sgdr"].schedule(config, 10)
    cosine = arms.ARMS["cal"].schedule(dataclasses.replace(config, epochs=100), 10)
    for epoch in (0, 1, 50, 99):
        for step in (10 * epoch, 10 * epoch + 9, 10 * (epoch + 100)):
            np.testing.assert_allclose(rates(step), cosine(10 * epoch), rtol=1e-5)
