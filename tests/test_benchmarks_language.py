"""The language model, its text, and what controls do to a method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tb_optax
from benchmarks import controls, language
from benchmarks.configs import LanguageConfig
from benchmarks.models import llama

CONFIG = LanguageConfig(
    epochs=5, steps=2, length=12, width=56, depth=2, heads=2, refresh=3, windows=4
)


def model(*, tied=False):
    return llama.Llama(256, width=56, depth=2, heads=2, tied=tied, rngs=nnx.Rngs(0))


def traced(*, tied=False):
    """The layers of the model."""
    abstract = nnx.eval_shape(lambda: model(tied=tied))
    tokens = jax.ShapeDtypeStruct((1, 12), jnp.int32)
    run = llama.Llama.__call__
    return tb_optax.trace_layers(run, abstract, tokens, norms="none")


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_changes_no_earlier_prediction(tied):
    network = jax.jit(model(tied=tied).__call__)
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    changed = tokens.at[:, 7].add(1)
    before, after = network(tokens), network(changed % 256)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (jnp.abs(before - after)[:, 7:].max(-1) > 1e-3).all()


def test_rotated_products_depend_on_distances_alone():
    key = jax.random.key(0)
    query, other = jax.random.normal(key, (2, 8))
    alike = jnp.broadcast_to(query, (1, 6, 1, 8)), jnp.broadcast_to(other, (1, 6, 1, 8))
    one, two = (np.asarray(llama.rotate(x)[0, :, 0]) for x in alike)
    products = one @ two.T
    for distance in range(-5, 6):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    np.testing.assert_allclose(products[0, 0], query @ other, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_seven_per_block_and_the_head(tied):
    layers = traced(tied=tied)
    assert len(layers) == 2 * 7 + 1
    assert layers[-1].path == ("embedding/embedding" if tied else "head/kernel")


def test_no_file_is_in_two_parts(tmp_path):
    for number in range(80):
        (tmp_path / f"{number}.py").write_text(chr(40 + number) * 32)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "more.py").write_text("!" * 80)
    text = language.load(dataclasses.replace(CONFIG, windows=200), tmp_path)
    found = [set(part.reshape(-1).tolist()) for (part,) in text.parts.values()]
    assert all(found)
    assert set.union(*found) == set(range(40, 120))
    assert sum(map(len, found)) == 80
    digest = text.digest
    (tmp_path / "0.py").write_text("changed" * 8)
    assert language.load(CONFIG, tmp_path).digest != digest


# --- controls -------------------------------------------------------------------------

MULTIPLIERS = jnp.asarray([0.5, 1.5, 1.0, 0.6, 0.9])
TUNED = jnp.asarray([True, True, False, True, True])


@pytest.mark.parametrize(
    "control", [controls.averaged, controls.shuffled, controls.reversed_order]
)
def test_controls_keep_the_mean_and_what_is_not_tuned(control):
    changed = control(MULTIPLIERS, TUNED, 3)
    assert changed[2] == 1
    np.testing.assert_allclose(changed[TUNED].mean(), MULTIPLIERS[TUNED].mean())
    assert (changed[TUNED] != MULTIPLIERS[TUNED]).any()
    none = jnp.zeros_like(TUNED)
    np.testing.assert_array_equal(control(MULTIPLIERS, none, 3), MULTIPLIERS)


def test_what_each_control_does():
    ranks = np.argsort(MULTIPLIERS[TUNED])
    mirrored = controls.reversed_order(MULTIPLIERS, TUNED, 0)[TUNED]
    np.testing.assert_array_equal(np.argsort(mirrored), ranks[::-1])
    assert np.ptp(controls.averaged(MULTIPLIERS, TUNED, 0)[TUNED]) == 0
    drawn = controls.shuffled(MULTIPLIERS, TUNED, 0)
    np.testing.assert_array_equal(np.sort(drawn), np.sort(MULTIPLIERS))


def trajectory(arm, steps=4):
    """The parameters after some updates with drawn gradients, and the multipliers."""
    optimizer = arm.build(CONFIG, traced(), 0, 1e-2)

    @jax.jit
    def run(params):
        def body(carry, key):
            params, state = carry
            keys = optax.tree.split_key_like(key, params)
            gradients = jax.tree.map(
                lambda key, leaf: jax.random.normal(key, leaf.shape), keys, params
            )
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(body, (params, optimizer.init(params)), keys)[0]

    params = nnx.to_pure_dict(nnx.state(model(), nnx.Param))
    return run(params)


@pytest.mark.parametrize(
    "name",
    [
        *("temp_balance", "alpha_decay"),
        *(pytest.param(x, marks=pytest.mark.long) for x in ("llr", "model_balancing")),
    ],
)
def test_a_control_that_changes_nothing_is_the_method(name):
    arm = language.ARMS[name]
    same = dataclasses.replace(arm, control=lambda multipliers, *_: multipliers)
    (params, state), (expected, _) = trajectory(same), trajectory(arm)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        params,
        expected,
    )
    # And the method does something: uniform multipliers would show nothing.
    assert np.ptp(tb_optax.get_multipliers(state)) > 0.1


def test_every_arm_trains_and_no_layer_is_too_small():
    assert LanguageConfig().width >= 50  # `controlled` takes what is fitted as tuned.
    for name, arm in language.ARMS.items():
        assert (arm.parent in language.ARMS) == (arm.parent is not None)
        assert arm.name == name
        rates = arm.schedule(CONFIG, CONFIG.steps, 1.0)
        total = CONFIG.epochs * CONFIG.steps
        found = [float(np.asarray(rates(step))) for step in (0, total // 10, total)]
        np.testing.assert_allclose(found, [0, 1, 0.1], atol=1e-6)
