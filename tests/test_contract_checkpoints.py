"""Training saved and resumed, with Orbax."""

import configurations as table
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from configurations import CONFIGURATIONS

import tb_optax

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Saved after two steps of five, these are between two refreshes.
every_row = pytest.mark.parametrize(
    "row", [row for row in CONFIGURATIONS if row.every == 3], ids=lambda row: row.name
)


@every_row
def test_resumed_training_is_uninterrupted_training(row, tmp_path):
    """Saved between two refreshes, restored into the shapes that `init` tells."""
    start = table.make_params()
    transform = row.transform()
    halfway = table.train(row, start, transform.init(start), range(2))
    params, state = halfway
    expected = table.train(row, params, state, range(2, 5))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "halfway", halfway)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: (start, transform.init(start)))
        restored = checkpointer.restore(tmp_path / "halfway", target)
    table.assert_equal(restored, halfway)
    assert isinstance(tb_optax.get_state(restored), tb_optax.TempBalanceState)
    params, state = restored
    table.assert_equal(table.train(row, params, state, range(2, 5)), expected)


def test_fields_on_disk_are_those_of_the_state(tmp_path):
    """Old checkpoints can be read only as long as these names stand."""
    transform = tb_optax.scale_by_temp_balance(table.ANALYZE, interval=1)
    params = table.make_params()
    _, state = transform.update(params, transform.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        raw = checkpointer.restore(tmp_path / "state")
    fields = {"count", "multipliers", "alpha", "target", "refreshed"}
    assert set(raw) == fields
    table.assert_equal(jnp.asarray(raw["alpha"]), tb_optax.get_state(state).alpha)
