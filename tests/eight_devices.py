"""The analysis and the transform on a mesh: `test_sharding` runs this file."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from compiled import largest_gathered
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tb_optax
from tb_optax import Layer, MatrixAxes
from tb_optax.analysis import layer_spectra
from tb_optax.eigenvalues import find_scale
from tb_optax.layers import expand_stacks
from tb_optax.sharding import mesh_of, on_mesh
from tb_optax.spectrum import GRAM, Route

DENSE = MatrixAxes((0,), (1,))
# Shapes whose axes some mesh axis divides, and one that none does.
ZOO = {
    "conv": ((3, 3, 12, 24), MatrixAxes((2,), (3,), pooled=(0, 1))),
    "dense": ((48, 40), DENSE),
    "heads": ((4, 12, 40), MatrixAxes((0, 1), (2,))),
    "odd": ((13, 7), DENSE),
    "stack": ((3, 48, 40), MatrixAxes((1,), (2,), stacked=(0,))),
}
LAYERS = tuple(Layer(name, axes) for name, (_, axes) in ZOO.items())
SHAPES = {name: shape for name, (shape, _) in ZOO.items()}
ANALYZE = tb_optax.layer_analysis(LAYERS, min_eigenvalues=5)

PLACEMENTS = {
    "replicated": {},
    "fsdp": {
        "dense": P(("x", "y")),
        "stack": P(None, ("x", "y")),
        "heads": P(None, "x"),
    },
    "tensor": {
        "conv": P(None, None, None, "x"),
        "dense": P(None, "y"),
        "heads": P("x", None, None),
    },
    "mixed": {
        "conv": P(None, None, "y", "x"),
        "dense": P("y", "x"),
        "heads": P(None, "y", "x"),
        "stack": P(None, "x", "y"),
    },
}
every_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)


def or_long(*values):
    """Parameters of a case that proves little beside the others, and takes long."""
    return pytest.param(*values, marks=pytest.mark.long)


one_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, or_long(AxisType.Explicit)], ids=str
)


def make_mesh(axis_type, shape=(4, 2)):
    devices = jax.devices()[: math.prod(shape)]
    names = ("x", "y")[: len(shape)]
    types = (axis_type,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(
            rng.normal(size=shape) * (1 + np.arange(shape[-1])) ** -0.7, np.float32
        )
        for name, shape in SHAPES.items()
    }


def place(params, mesh, placement):
    specs = PLACEMENTS[placement]
    return {
        name: jax.device_put(kernel, NamedSharding(mesh, specs.get(name, P())))
        for name, kernel in params.items()
    }


@functools.cache
def alone(seed=0):
    """The table of one device."""
    return jax.device_get(ANALYZE(make_params(seed)))


def assert_equal(one, other):
    """To the bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), other)


def assert_spread(compiled):
    """No device gathers a kernel."""
    # Of a bucket all eigenvalues are gathered, n for each of at most 16 matrices.
    assert largest_gathered(str(compiled.as_text())) <= 16 * 40 < 48 * 40


def decomposed(params, axes=()):
    """How many matrices of each shape a device decomposes, as it is traced."""
    shapes: Counter[tuple[int, ...]] = Counter()

    def record(buckets):
        for bucket in buckets:
            shapes[bucket.shape[1:]] += len(bucket)
        return GRAM.decompose(buckets)

    def spectra(params):
        def function(kernels):
            layers = expand_stacks(LAYERS, SHAPES)
            return layer_spectra(kernels, layers, 0.5, Route(record, 1)).exponent

        return on_mesh(mesh_of(params, None), function, params)

    if axes:
        spectra = jax.shard_map(
            spectra, in_specs=P(), out_specs=P(), axis_names={*axes}
        )
    jax.eval_shape(spectra, params)
    return shapes


@pytest.mark.parametrize("axes", [(), ("x",), ("x", "y")], ids=str)
@every_type
def test_each_device_decomposes_its_share(axis_type, axes):
    """Of 9, 5 and 1 matrices of three shapes."""
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        params = place(make_params(), mesh, "replicated" if axes else "mixed")
        shapes = {(12, 24): 2, (48, 40): 1, (13, 7): 1}
        assert decomposed(params, axes) == shapes
    alone = {(12, 24): 9, (48, 40): 5, (13, 7): 1}
    assert decomposed(make_params()) == alone


@pytest.mark.parametrize("spec", [P("x"), P(None, "x", "y"), P(None, ("x", "y"))])
def test_matrices_in_pieces_have_the_same_scale(spec):
    """Where no mesh is known, XLA alone says how."""
    scales = np.asarray([1, 3, 1e-30, 1e30, 0, 1e-40, np.inf, np.nan], np.float32)
    normal = np.random.default_rng(3).normal(size=(8, 48, 40))
    matrices = normal.astype(np.float32) * scales[:, None, None]
    sharding = NamedSharding(make_mesh(AxisType.Auto), spec)
    found = jax.jit(find_scale)([jax.device_put(matrices, sharding)])
    assert_equal(found, jax.device_get(find_scale([jnp.asarray(matrices)])))


def check_spread(function, params):
    """One compilation, for its text and for its table."""
    compiled = jax.jit(function).lower(params).compile()
    assert_spread(compiled)
    table = compiled(params)
    assert_equal(table, alone())
    for column in jax.tree.leaves(table):
        assert column.sharding.is_fully_replicated


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize(
    ("placement", "axis_type"),
    [
        or_long("replicated", AxisType.Auto),
        ("fsdp", AxisType.Auto),
        ("mixed", AxisType.Auto),
        ("tensor", AxisType.Explicit),
        ("mixed", AxisType.Explicit),
    ],
    ids=str,
)
def test_one_table_wherever_the_kernels_lie(placement, axis_type):
    """The mesh is that of the parameters."""
    params = place(make_params(), make_mesh(axis_type), placement)
    check_spread(ANALYZE.__call__, params)


@every_type
def test_a_mesh_that_is_set(axis_type):
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        check_spread(ANALYZE.__call__, place(make_params(), mesh, "mixed"))


@one_type
def test_a_mesh_that_is_given(axis_type):
    """Arrays outside of it are copied to it."""
    mesh = make_mesh(axis_type)
    analyze = tb_optax.layer_analysis(LAYERS, min_eigenvalues=5, mesh=mesh)
    table = analyze(make_params())
    assert_equal(table, alone())
    for column in jax.tree.leaves(table):
        assert len(column.sharding.device_set) == 8


def test_singular_values_and_spectra_are_spread_too():
    params = place(make_params(), make_mesh(AxisType.Explicit), "mixed")
    analyze = tb_optax.layer_analysis(
        LAYERS, fit=tb_optax.fit_min_ks(), min_eigenvalues=5
    )
    assert_equal(analyze(params), jax.device_get(analyze(make_params())))
    for one, other in zip(
        tb_optax.esd(params, LAYERS), tb_optax.esd(make_params(), LAYERS), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("manual", "axis_type"),
    [
        (("x", "y"), AxisType.Auto),
        or_long(("x",), AxisType.Auto),
        (("x",), AxisType.Explicit),
    ],
    ids=str,
)
def test_inside_shard_map(manual, axis_type):
    mesh = make_mesh(axis_type)
    inside = jax.jit(
        jax.shard_map(
            ANALYZE.__call__,
            mesh=mesh,
            in_specs=P(),
            out_specs=P(),
            axis_names={*manual},
        )
    )
    check_spread(inside, place(make_params(), mesh, "replicated"))


def test_inside_shard_map_without_its_checks_each_device_works_alone():
    mesh = make_mesh(AxisType.Explicit)
    inside = jax.shard_map(
        ANALYZE.__call__, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    assert_equal(jax.jit(inside)(place(make_params(), mesh, "replicated")), alone())


def test_kernels_that_differ_inside_shard_map():
    mesh = make_mesh(AxisType.Explicit)
    params = place(make_params(), mesh, "fsdp")
    specs = {name: PLACEMENTS["fsdp"].get(name, P()) for name in params}
    inside = jax.shard_map(
        lambda params: ANALYZE(params).alpha,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"layer 'dense'.*shard_map.*'x', 'y'.*gather"):
        jax.jit(inside)(params)


def test_another_mesh_than_the_one_in_use():
    analyze = tb_optax.layer_analysis(LAYERS, mesh=make_mesh(AxisType.Auto, (2,)))
    with (
        jax.set_mesh(make_mesh(AxisType.Auto)),
        pytest.raises(ValueError, match=r"mesh = \{'x': 2\}.*\{'x': 4, 'y': 2\}"),
    ):
        analyze(make_params())


@pytest.mark.parametrize("fault", [math.nan, math.inf, 0.0])
def test_a_bad_kernel_stays_alone(fault):
    mesh = make_mesh(AxisType.Explicit)
    params = make_params()
    params["dense"] = params["dense"] * 0 + np.float32(fault)
    expected = jax.device_get(ANALYZE(params))
    table = ANALYZE(place(params, mesh, "mixed"))
    assert_equal(table, expected)
    assert not table.fitted[1]


@functools.cache
def training(spread):
    """A jitted step, and how its optimizer starts."""
    tx = tb_optax.temp_balance(
        optax.sgd(0.1, momentum=0.9), ANALYZE, interval=2, spread=spread
    )

    def step(params, state):
        gradients = jax.tree.map(jnp.cos, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, jax.jit(step)


def run(spread, params, state=None, steps=4):
    init, step = training(spread)
    state = init(params) if state is None else state
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize(
    ("spread", "axis_type"),
    [
        or_long(False, AxisType.Auto),
        (False, AxisType.Explicit),
        (True, AxisType.Auto),
        or_long(True, AxisType.Explicit),
    ],
    ids=str,
)
def test_training_goes_as_on_one_device(spread, axis_type):
    params, state = run(spread, make_params())
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        sharded = place(make_params(), mesh, "mixed")
        init, step = training(spread)
        before = init(sharded)
        after = run(spread, sharded, before)
        types = jax.tree.map(jax.typeof, (sharded, before))
        assert jax.tree.map(jax.typeof, after) == types
        own = tb_optax.get_state(after[1])
        assert all(leaf.sharding.is_fully_replicated for leaf in own)
        for name, kernel in after[0].items():
            assert kernel.sharding.is_equivalent_to(sharded[name].sharding, kernel.ndim)
        compiled = step.lower(sharded, before).compile()
        assert largest_gathered(str(compiled.as_text())) <= 16 * 40
        if not spread:
            assert_spread(compiled)
    # Pieces pool tables of another width: sums may round differently.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    same = close if spread else np.testing.assert_array_equal
    jax.tree.map(same, jax.device_get(after), jax.device_get((params, state)))


@one_type
def test_a_scan_on_a_mesh_that_only_the_parameters_know(axis_type):
    params = place(make_params(), make_mesh(axis_type), "tensor")
    init, step = training(False)

    @jax.jit
    def scan(carry):
        return jax.lax.scan(lambda carry, _: (step(*carry), None), carry, length=4)[0]

    expected = jax.device_get(run(False, make_params()))
    assert_equal(scan((params, init(params))), expected)


@pytest.mark.parametrize(("before", "after"), [((4, 2), (2,)), ((2,), (4, 2))], ids=str)
def test_a_checkpoint_moves_to_another_number_of_devices(before, after, tmp_path):
    expected = jax.device_get(run(False, make_params(), steps=6))

    def placed_on(shape):
        mesh = make_mesh(AxisType.Auto, shape)
        placement = "mixed" if len(shape) == 2 else "replicated"
        params = place(make_params(), mesh, placement)
        everywhere = NamedSharding(mesh, P())
        state = training(False)[0](params)
        return params, jax.tree.map(lambda x: jax.device_put(x, everywhere), state)

    params, state = placed_on(before)
    params, state = run(False, params, state, steps=3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            placed_on(after),
        )
        restored = checkpointer.restore(tmp_path / "state", target)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {
        math.prod(after)
    }
    assert_equal(run(False, *restored, steps=3), expected)


def test_devices_that_share_their_threads_do_not_wait_for_each_other():
    """Several analyses in one program, on devices with the threads of one host."""
    mesh = make_mesh(AxisType.Auto)
    analyses = [ANALYZE, tb_optax.layer_analysis(LAYERS[::2], min_eigenvalues=5)]
    together = jax.jit(lambda params: [analyze(params) for analyze in analyses])
    params = place(make_params(), mesh, "mixed")
    for _ in range(50):
        table, _ = jax.block_until_ready(together(params))
    assert_equal(table, alone())
