"""Quadrature on a mesh: only vectors move. `test_sharding` runs this file."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import largest_moved
from eight_devices import DENSE, make_mesh, or_long
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tb_optax
from tb_optax import Layer, MatrixAxes

# Kernels of every kind, larger than their vectors; one that no mesh axis divides.
ZOO = {
    "conv": ((2, 2, 96, 128), MatrixAxes((2,), (3,), pooled=(0, 1))),
    "fused": ((96, 320), DENSE),
    "heads": ((4, 24, 160), MatrixAxes((0, 1), (2,))),
    "odd": ((99, 133), DENSE),
    "stack": ((4, 96, 160), MatrixAxes((1,), (2,), stacked=(0,))),
    "tall": ((192, 96), DENSE),
}
LAYERS = (
    *(Layer(name, axes) for name, (_, axes) in ZOO.items() if name != "fused"),
    *(Layer("fused", DENSE, part=(1, start, start + 160)) for start in (0, 160)),
)
PROBES, STEPS = 2, 8
ANALYZE = tb_optax.layer_analysis(
    LAYERS, spectrum=tb_optax.quadrature(above=90, probes=PROBES, steps=STEPS)
)
# All matrices of 96 rows share a recurrence: 4 + 2 + 1 + 4 + 1 of them.
VECTORS = 12 * PROBES * 96
SMALLEST_KERNEL = 99 * 133

PLACEMENTS = {
    "replicated": {},
    "fsdp": {
        "conv": P(None, None, ("x", "y")),
        "fused": P(("x", "y")),
        "heads": P(None, ("x", "y")),
        "stack": P(None, ("x", "y")),
        "tall": P(("x", "y")),
    },
    "tensor": {
        "conv": P(None, None, None, "x"),
        "fused": P(None, ("x", "y")),
        "heads": P("x", None, None),
        "stack": P(None, None, ("x", "y")),
        "tall": P("x"),
    },
    "mixed": {
        "conv": P(None, None, "y", "x"),
        "fused": P("x", "y"),
        "heads": P(None, "y", "x"),
        "stack": P(None, "x", "y"),
        "tall": P("y", "x"),
    },
    "stacked": {"conv": P("y", None, "x"), "stack": P("x", "y"), "tall": P(None, "x")},
}


def make_params():
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(
            rng.normal(size=shape) * (1 + np.arange(shape[-1])) ** -0.3, np.float32
        )
        for name, (shape, _) in ZOO.items()
    }


def place(params, mesh, placement):
    specs = PLACEMENTS[placement]
    return {
        name: jax.device_put(kernel, NamedSharding(mesh, specs.get(name, P())))
        for name, kernel in params.items()
    }


@functools.cache
def alone():
    """The table of one device."""
    table = jax.device_get(ANALYZE(make_params()))
    assert table.tuned.all()
    return table


def assert_close(found, expected):
    """To 1e-5, or 1e-4 where alpha is below 2: there small nodes decide."""
    found = jax.device_get(found)
    tolerance = np.where(expected.alpha < 2, 1e-4, 1e-5)
    for name in ("alpha", "xmin", "stable_rank", "spectral_norm", "frobenius_norm"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (np.abs(one - other) <= tolerance * other).all(), name
    np.testing.assert_array_equal(found.tail_size, expected.tail_size)
    spread = np.ptp(expected.alpha) / expected.alpha.max()
    np.testing.assert_allclose(
        found.multipliers, expected.multipliers, atol=4e-4 / spread
    )


def assert_vectors_only(compiled):
    assert largest_moved(str(compiled.as_text())) <= VECTORS < SMALLEST_KERNEL


def check(function, params):
    """One compilation, for its text and for its table."""
    compiled = jax.jit(function).lower(params).compile()
    assert_vectors_only(compiled)
    table = compiled(params)
    assert_close(table, alone())
    for column in jax.tree.leaves(table):
        assert column.sharding.is_fully_replicated
        first, *others = (np.asarray(shard.data) for shard in column.addressable_shards)
        for other in others:
            np.testing.assert_array_equal(other, first)


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize(
    ("placement", "axis_type"),
    [
        or_long("replicated", AxisType.Auto),
        ("fsdp", AxisType.Auto),
        ("tensor", AxisType.Explicit),
        or_long("mixed", AxisType.Auto),
        ("mixed", AxisType.Explicit),
        or_long("stacked", AxisType.Explicit),
    ],
    ids=str,
)
def test_kernels_stay_where_they_are(placement, axis_type):
    """The mesh is that of the parameters; all devices have the same table."""
    check(ANALYZE.__call__, place(make_params(), make_mesh(axis_type), placement))


def test_a_mesh_that_is_set():
    mesh = make_mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        check(ANALYZE.__call__, place(make_params(), mesh, "fsdp"))


@pytest.mark.parametrize("manual", [or_long(("x", "y")), ("x",)], ids=str)
def test_inside_shard_map(manual):
    """Kernels that every device holds; the rest of the mesh may shard them."""
    mesh = make_mesh(AxisType.Auto)
    inside = jax.shard_map(
        ANALYZE.__call__, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={*manual}
    )
    check(inside, place(make_params(), mesh, "replicated"))


@functools.cache
def training(spread):
    """A jitted step, and how its optimizer starts."""
    tx = tb_optax.temp_balance(
        optax.sgd(0.01, momentum=0.9), ANALYZE, interval=3, spread=spread
    )

    def step(params, state):
        gradients = jax.tree.map(jnp.cos, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, jax.jit(step)


def run(spread, params):
    init, step = training(spread)
    state = init(params)
    for _ in range(4):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize(
    ("spread", "axis_type"),
    [
        (False, AxisType.Explicit),
        (True, AxisType.Auto),
        or_long(True, AxisType.Explicit),
    ],
    ids=str,
)
def test_training_goes_as_on_one_device(spread, axis_type):
    expected, state = run(spread, make_params())
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        sharded = place(make_params(), mesh, "mixed")
        init, step = training(spread)
        found, own = run(spread, sharded)
        compiled = step.lower(sharded, init(sharded)).compile()
        assert_vectors_only(compiled)
    for name, kernel in found.items():
        np.testing.assert_allclose(kernel, expected[name], rtol=1e-5, atol=1e-5)
        assert kernel.sharding.is_equivalent_to(sharded[name].sharding, kernel.ndim)
    alphas = [tb_optax.get_state(one).alpha for one in (own, state)]
    np.testing.assert_allclose(*alphas, rtol=1e-5)
    assert (alphas[0] != alone().alpha).all()


@pytest.mark.parametrize("fault", [math.nan, 0.0])
def test_a_bad_kernel_stays_alone(fault):
    params = make_params()
    params["tall"] = params["tall"] * 0 + np.float32(fault)
    table = ANALYZE(place(params, make_mesh(AxisType.Explicit), "mixed"))
    row = [layer.path for layer in table.layers].index("tall")
    others = np.arange(len(table.layers)) != row
    assert not table.fitted[row]
    assert table.multipliers[row] == 1
    np.testing.assert_allclose(table.alpha[others], alone().alpha[others], rtol=1e-4)
