"""Where the transform stands in a chain: equal chains, and chains that differ."""

import configurations as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from configurations import ANALYZE, CONFIGURATIONS, OPTIMIZERS

import tb_optax

every_optimizer = pytest.mark.parametrize(
    "optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS
)

MULTIPLIERS = [0.5, 2.0, 1.25]
MOMENTUM = optax.sgd(0.05, momentum=0.9)


def schedule(count):
    return 0.05 / (1 + count)


def balance(interval=1, analyze=ANALYZE):
    return tb_optax.scale_by_temp_balance(analyze, interval=interval)


def train(transform, multipliers=None, steps=4):
    """Params after some jitted steps, with these multipliers from the start."""
    params = table.make_params()
    state = transform.init(params)
    if multipliers is not None:
        state = tb_optax.set_multipliers(state, multipliers)
    step = jax.jit(table.make_step(transform))
    for _ in range(steps):
        params, state = step(params, state)
    return params


def largest_difference(one, other):
    differences = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), one, other)
    return max(jax.tree.leaves(differences))


def test_before_and_after_the_learning_rate_are_one():
    decay, rate = optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(schedule)
    after = optax.chain(decay, optax.sgd(schedule, momentum=0.9), balance(3))
    before = optax.chain(decay, optax.trace(decay=0.9), balance(3), rate)
    table.assert_close(train(after), train(before))


@pytest.mark.parametrize("row", CONFIGURATIONS, ids=lambda row: row.name)
def test_temp_balance_is_the_chain(row):
    params = table.make_params()
    chain = optax.chain(row.optimizer(), balance(row.interval))
    recipe = row.transform()
    state, grads = recipe.init(params), table.gradient(params)
    table.assert_equal(state, chain.init(params))
    table.assert_equal(
        recipe.update(grads, state, params), chain.update(grads, state, params)
    )


@every_optimizer
@pytest.mark.parametrize("interval", [1, None])
def test_multipliers_of_one_are_no_transform_at_all(optimizer, interval):
    """By a map to 1, and by a host that never refreshes."""
    assign = tb_optax.linear(1.0, 1.0)
    analyze = tb_optax.layer_analysis(assign=assign, min_eigenvalues=4)
    transform = tb_optax.temp_balance(optimizer(), analyze, interval=interval)
    params, plain = table.make_params(), optimizer()
    state, inner = transform.init(params), plain.init(params)
    for _ in range(2):
        grads = table.gradient(params)
        expected, inner = plain.update(grads, inner, params)
        updates, state = transform.update(grads, state, params)
        table.assert_equal(updates, expected)
        params = optax.apply_updates(params, updates)
    assert tb_optax.get_multipliers(state).tolist() == [1, 1, 1]


@every_optimizer
def test_a_multiplier_is_a_learning_rate_of_its_layer(optimizer):
    """As parameter groups are: the decay of a layer is scaled with its rate."""
    balanced = tb_optax.temp_balance(optimizer(0.05), ANALYZE, interval=None)
    layers = ("Conv_0", "Dense_0", "Dense_1")
    rates = dict(zip(layers, np.multiply(0.05, MULTIPLIERS), strict=True))
    rates["BatchNorm_0"] = rates["Conv_0"]
    labels = {
        module: jax.tree.map(lambda _, label=module: label, leaves)
        for module, leaves in table.make_params().items()
    }
    groups = optax.partition(
        {module: optimizer(float(rate)) for module, rate in rates.items()}, labels
    )
    table.assert_close(train(balanced, MULTIPLIERS), train(groups))


def test_only_constant_multipliers_commute_with_momentum():
    after = train(optax.chain(MOMENTUM, balance(None)), MULTIPLIERS)
    before = train(optax.chain(balance(None), MOMENTUM), MULTIPLIERS)
    table.assert_close(after, before)
    after = train(optax.chain(MOMENTUM, balance(1)))
    before = train(optax.chain(balance(1), MOMENTUM))
    assert largest_difference(after, before) > 1e-3


@pytest.mark.parametrize(
    "optimizer", [optax.adam(0.05), optax.lion(0.05, weight_decay=0.0)]
)
def test_before_a_normalizing_optimizer_is_no_transform_at_all(optimizer):
    plain = train(optimizer)
    before = train(optax.chain(balance(None), optimizer), MULTIPLIERS)
    after = train(optax.chain(optimizer, balance(None)), MULTIPLIERS)
    table.assert_close(before, plain)
    assert largest_difference(after, plain) > 0.05
