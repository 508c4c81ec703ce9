"""What loggers are given, and what can be read back from what they have written."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tb_optax
from tb_optax import MatrixAxes

SCHEDULE = optax.linear_schedule(1.0, 0.0, 10)
PARAMS = {
    name: {"kernel": jnp.cos(scale * jnp.arange(4096.0) ** 2).reshape(64, 64)}
    for name, scale in {"a": 0.3, "b": 0.7, "c": 1.1}.items()
}
LAYERS = tb_optax.find_layers(PARAMS)


@pytest.fixture(scope="module")
def states():
    """The optimizer states and the largest rates that each update has used."""
    analyze = tb_optax.layer_analysis(LAYERS)
    tx = tb_optax.temp_balance(optax.sgd(SCHEDULE), analyze, interval=2)

    @jax.jit
    def step(state):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
        return state, [-update[0, 0] for update in jax.tree.leaves(updates)]

    state, found = tx.init(PARAMS), []
    for _ in range(4):
        state, rates = step(state)
        found.append((state, jax.device_get(rates)))
    return found


def test_the_rate_in_force_is_that_of_the_last_update(states):
    def log(state):  # It may be called inside a step, so it needs no number.
        return tb_optax.log_dict(state, LAYERS, learning_rate=SCHEDULE)

    for state, used in states:
        logged = jax.jit(log)(state)
        rates = [logged[f"learning_rate/{layer.name}"] for layer in LAYERS]
        np.testing.assert_allclose(rates, used, rtol=1e-6)
        assert len(set(map(float, rates))) == len(LAYERS)
    halved = tb_optax.log_dict(state, LAYERS, learning_rate=0.5)
    multipliers = [halved[f"multiplier/{layer.name}"] for layer in LAYERS]
    rates = [halved[f"learning_rate/{layer.name}"] for layer in LAYERS]
    np.testing.assert_allclose(rates, 0.5 * np.asarray(multipliers))


def test_a_rate_is_a_scalar(states):
    with pytest.raises(ValueError, match=r"a schedule or a scalar, got shape \(2,\)"):
        tb_optax.log_dict(states[0][0], LAYERS, learning_rate=jnp.ones(2))


def test_tensorboard_has_what_was_logged(states, tmp_path):
    from tensorboardX import SummaryWriter, proto

    events: Any = proto.event_pb2

    logged = [
        jax.device_get(tb_optax.log_dict(state, LAYERS, learning_rate=SCHEDULE))
        for state, _ in states
    ]
    with SummaryWriter(str(tmp_path)) as writer:
        for step, values in enumerate(logged):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
    (path,) = tmp_path.iterdir()
    data, read = path.read_bytes(), [{} for _ in logged]
    while data:  # Records: length, its checksum, an event, its checksum.
        length = int.from_bytes(data[:8], "little")
        body, data = data[12 : 12 + length], data[16 + length :]
        event = events.Event.FromString(body)
        for value in event.summary.value:
            read[event.step][value.tag] = np.float32(value.simple_value)
    assert read == [{k: np.float32(v) for k, v in row.items()} for row in logged]


def test_weights_and_biases_has_what_was_logged(states, tmp_path):
    """An offline run, where wandb is installed: no extra of ours asks for it."""
    wandb = pytest.importorskip("wandb")
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    logged = jax.device_get([tb_optax.log_dict(state, LAYERS) for state, _ in states])
    rows = [{name: float(value) for name, value in row.items()} for row in logged]
    settings = wandb.Settings(silent=True, x_disable_meta=True, x_disable_stats=True)
    with wandb.init(mode="offline", dir=str(tmp_path), settings=settings) as run:
        for step, row in enumerate(rows):
            run.log(row, step=step)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    data, read = path.read_bytes()[7:], []
    while data:  # Records: checksum, length, 1 for a whole one, a message.
        assert data[6] == 1
        length = int.from_bytes(data[4:6], "little")
        message, data = data[7 : 7 + length], data[7 + length :]
        items = record.FromString(message).history.item
        values = {"/".join(i.nested_key): json.loads(i.value_json) for i in items}
        if values:
            read.append({k: v for k, v in values.items() if not k.startswith("_")})
    assert read == rows


def test_snapshots_are_the_states(states):
    snapshots = [optax.tree.get(state, "TempBalanceState") for state, _ in states]
    history = jax.tree.map(lambda *values: jnp.stack(values), *snapshots)
    assert history.count.tolist() == [1, 2, 3, 4]
    for row, (state, _) in zip(history.multipliers, states, strict=True):
        np.testing.assert_array_equal(row, tb_optax.get_multipliers(state))


def test_stacks_have_a_rate_for_each_slice():
    params = {"w": jnp.ones((2, 8, 4))}
    axes = {"w": MatrixAxes((1,), (2,), stacked=(0,))}
    layers = tb_optax.find_layers(params, axes=axes)
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=0)
    tx = tb_optax.temp_balance(optax.sgd(0.1), analyze, interval=None)
    state = tb_optax.set_multipliers(tx.init(params), [0.5, 2.0])
    logged = tb_optax.log_dict(state, layers, learning_rate=0.1)
    rates = [logged[f"learning_rate/w[{i}]"] for i in range(2)]
    np.testing.assert_allclose(rates, [0.05, 0.2], rtol=1e-6)
