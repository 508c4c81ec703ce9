"""The arms: two steps of each, the controls, published numbers, rates, and types."""

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import eight_images

import tb_optax
from benchmarks import arms, configs, loop
from benchmarks.controls import averaged, shuffled
from benchmarks.published import settings


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
def two_steps():
    """Of each arm: the first analysis, the first updates, the weights in the end."""
    config = dataclasses.replace(configs.DIGITS, epochs=2)
    inputs = normal(8, 16, seed=0)
    layers = tb_optax.trace_layers(network, tiny(), inputs)[1:-1]
    gradient_fn = jax.jit(
        jax.grad(lambda params: jnp.mean((network(params, inputs) - 0.5) ** 2))
    )
    results = {}
    for name, arm in arms.ARMS.items():
        analyze = arm.analysis(config, layers, config.seed)
        rate = settings(config, name).learning_rate
        optimizer = arm.build(config, analyze, 1, config.seed, rate)

        def step(gradients, state, params, optimizer=optimizer):
            updates, state = optimizer.update(gradients, state, params)
            return state, optax.apply_updates(params, updates), updates

        step, params = jax.jit(step, donate_argnums=(1, 2)), tiny()
        state, analysis, first = optimizer.init(params), None, None
        if arm.balanced:
            # Those that differ in the optimizer alone have the same analysis.
            own = arm.control is not None or name == "tb"
            analysis = analyze(params) if own else results["tb"][0]
            state = tb_optax.set_multipliers(state, analysis)
        for _ in range(2):
            state, params, updates = step(gradient_fn(params), state, params)
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


@pytest.mark.parametrize(
    ("name", "control"), [("mean", averaged), ("shuffled", shuffled)]
)
def test_a_control_changes_the_multipliers_of_tempbalance(two_steps, name, control):
    balanced, analysis = two_steps["tb"][0], two_steps[name][0]
    expected = control(balanced.multipliers, balanced.tuned, configs.DIGITS.seed)
    np.testing.assert_allclose(analysis.multipliers, expected, rtol=1e-6)
    assert np.ptp(balanced.multipliers) > 0.5


def first_epoch(arm, **fields):
    """A program, its state, and its scores after an epoch of eight images."""
    config = dataclasses.replace(
        configs.DIGITS, model="resnet4", width=0.5, batch_size=4, epochs=2, **fields
    )
    dataset = eight_images()
    program = loop.make_program(config, arms.ARMS[arm], dataset)
    state = program.start(config.seed, 0.1)
    if arms.ARMS[arm].balanced:
        state, _ = program.refresh(state)
    rows = dataset.parts["train"]
    [state], [scores] = program.epoch(rows, 1)([state], rows, 0)
    return program, state, scores


@pytest.fixture(scope="module")
def plain():
    return first_epoch("cal")


def test_an_epoch_depends_on_seed_and_number_alone(plain):
    program, _, scores = plain
    losses, rows = [], eight_images().parts["train"]
    train = program.epoch(rows, 1)
    for seed, number in ((configs.DIGITS.seed, 0), (configs.DIGITS.seed, 1), (7, 0)):
        _, [own] = train([program.start(seed, 0.1)], rows, number)
        losses.append(float(own.loss))
    assert losses[0] == scores.loss
    assert len(set(losses)) == 3


def test_arms_share_weights_row_order_and_augmentation(plain):
    _, _, balanced = first_epoch("tb", low=1.0, high=1.0)
    np.testing.assert_allclose(balanced.loss, plain[2].loss, rtol=1e-6)


def test_only_training_computes_in_bfloat16(plain):
    program, state, scores = first_epoch("cal", compute="bfloat16")
    other_program, _, other_scores = plain
    test = eight_images().parts["test"]
    tested = program.evaluate(state, *test)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, scores, tested)):
        assert leaf.dtype == jnp.float32
    assert scores.loss != other_scores.loss
    np.testing.assert_allclose(scores.loss, other_scores.loss, rtol=0.02)
    # The loss of the same weights is the same: evaluation is in float32.
    expected = other_program.evaluate(state, *test)
    assert tested.loss == expected.loss


def test_numbers_are_the_published_ones():
    def numbers(arm, model="resnet18", dataset="cifar10", **given):
        names: Any = {"model": model, "dataset": dataset}
        base = dataclasses.replace(configs.CIFAR10, **names, **given)
        return settings(base, arm)

    assert numbers("cal") == (0.1, 0.001, 0.5, 1.5)
    assert numbers("tb", "vgg16") == (0.05, 0.005, 0.5, 1.5)
    assert numbers("tb_snr", "resnet34", "cifar100") == (0.1, 0.005, 0.6, 1.4)
    assert numbers("snr", "vgg19", "cifar100") == (0.05, 0.01, 0.5, 1.5)
    assert numbers("cal", "wrn28_6", "tiny_imagenet")[0] == 0.05
    assert numbers("tb", "wrn28_6", "tiny_imagenet") == (0.1, 1e-4, 0.6, 1.4)
    assert [numbers(arm)[0] for arm in ("lars", "lamb", "adamw")] == [28, 0.01, 0.001]
    of_resnet34 = [numbers(arm, "resnet34")[0] for arm in ("lars", "lookahead", "sgdr")]
    assert of_resnet34 == [32, 0.15, 0.05]
    given = {"learning_rate": 0.2, "snr": 0.3, "low": 0.4, "high": 2.0}
    assert numbers("tb_snr", **given) == (0.2, 0.3, 0.4, 2.0)


def test_sgdr_restarts_at_half_of_the_epochs():
    config = dataclasses.replace(configs.CIFAR10, epochs=200)
    rates = arms.ARMS["sgdr"].schedule(config, 10, 0.1)
    half = dataclasses.replace(config, epochs=100)
    cosine = arms.ARMS["cal"].schedule(half, 10, 0.1)
    for epoch in (0, 1, 50, 99):
        for step in (10 * epoch, 10 * epoch + 9, 10 * (epoch + 100)):
            np.testing.assert_allclose(rates(step), cosine(10 * epoch), rtol=1e-5)


def test_the_names_of_the_command_line_are_those_there_are():
    assert list(arms.ARMS) == list(get_args(configs.ArmName))
    assert list(arms.METRICS) == list(get_args(configs.Metric))
    assert list(arms.FITS) == list(get_args(configs.Fit))
    assert list(configs.RECIPES) == list(get_args(configs.DatasetName))
