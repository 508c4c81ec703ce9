"""The analysis and the transform on a mesh: `test_sharding` runs this file.

Where kernels are decomposed, tables are those of one device to the bit, and no device
gathers a kernel. Where spectra are estimated by quadrature, only vectors move.
"""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tb_optax
from tb_optax import Layer, MatrixAxes
from tb_optax.analysis import layer_spectra
from tb_optax.eigenvalues import find_scale
from tb_optax.layers import expand_stacks
from tb_optax.sharding import mesh_of, on_mesh
from tb_optax.spectrum import GRAM, Route

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
DENSE = MatrixAxes((0,), (1,))
CONV = MatrixAxes((2,), (3,), pooled=(0, 1))
HEADS = MatrixAxes((0, 1), (2,))
STACK = MatrixAxes((1,), (2,), stacked=(0,))
# Shapes whose axes some mesh axis divides, and one that none does; for quadrature
# kernels larger than their vectors.
ZOO = {
    "exact": {
        "conv": ((3, 3, 16, 24), CONV),
        "dense": ((48, 40), DENSE),
        "heads": ((4, 12, 40), HEADS),
        "odd": ((13, 7), DENSE),
        "stack": ((3, 48, 40), STACK),
    },
    "quadrature": {
        "conv": ((2, 2, 96, 128), CONV),
        "dense": ((192, 96), DENSE),
        "fused": ((96, 320), DENSE),
        "heads": ((4, 24, 160), HEADS),
        "odd": ((99, 133), DENSE),
        "stack": ((4, 96, 160), STACK),
    },
}
SHAPES = {
    kind: {name: shape for name, (shape, _) in zoo.items()} for kind, zoo in ZOO.items()
}
LAYERS = tuple(Layer(name, axes) for name, (_, axes) in ZOO["exact"].items())
PARTS = tuple(Layer("fused", DENSE, part=(1, i, i + 160)) for i in (0, 160))
PROBES = 2
ANALYZE = {
    "exact": tb_optax.layer_analysis(LAYERS, min_eigenvalues=5),
    "quadrature": tb_optax.layer_analysis(
        LAYERS + PARTS,
        spectrum=tb_optax.quadrature(above=90, probes=PROBES, steps=8),
    ),
}
PLACEMENTS = {
    "replicated": {},
    "fsdp": {
        "conv": P(None, None, ("x", "y")),
        "dense": P(("x", "y")),
        "fused": P(("x", "y")),
        "heads": P("x", "y"),
        "stack": P(None, ("x", "y")),
    },
    "tensor": {
        "conv": P(None, None, None, "x"),
        "dense": P("x"),
        "fused": P(None, ("x", "y")),
        "heads": P("x", None, None),
        "stack": P(None, None, ("x", "y")),
    },
    "mixed": {
        "conv": P(None, None, "y", "x"),
        "dense": P("y", "x"),
        "fused": P("x", "y"),
        "heads": P(None, "y", "x"),
        "stack": P(None, "x", "y"),
    },
    "stacked": {"conv": P("y", None, "x"), "dense": P(None, "x"), "stack": P("x", "y")},
}


def cases(names, *rows):
    """Parameters of a test; rows that end with "long" prove little, and take long."""
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*row[:-1], marks=pytest.mark.long)
            if row[-1] == "long"
            else pytest.param(*row)
            for row in rows
        ],
        ids=str,
    )


one_type = cases(("axis_type",), (AUTO,), (EXPLICIT, "long"))


def make_mesh(axis_type, shape=(4, 2)):
    devices = jax.devices()[: math.prod(shape)]
    names = ("x", "y")[: len(shape)]
    types = (axis_type,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


def make_params(kind="exact"):
    """Kernels with heavy tails."""
    rng = np.random.default_rng(0)
    decay = {"exact": 0.7, "quadrature": 0.3}[kind]
    return {
        name: np.asarray(
            rng.normal(size=shape) * (1 + np.arange(shape[-1])) ** -decay, np.float32
        )
        for name, shape in SHAPES[kind].items()
    }


def place(params, mesh, placement):
    specs = PLACEMENTS[placement]
    return {
        name: jax.device_put(kernel, NamedSharding(mesh, specs.get(name, P())))
        for name, kernel in params.items()
    }


@functools.cache
def alone(kind="exact"):
    """The table of one device."""
    table = jax.device_get(ANALYZE[kind](make_params(kind)))
    assert table.tuned.all()
    return table


def assert_equal(one, other):
    """To the bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), other)


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


assert_same = {"exact": assert_equal, "quadrature": assert_close}


def largest_array(compiled, operations):
    """Entries of the largest array that one of these operations leaves."""
    left = rf" = \(?(.*?)\)? (?:{operations})(?:-start)?\("
    arrays = " ".join(re.findall(left, str(compiled.as_text())))
    shapes = re.findall(r"[a-z]+\d*\[([\d,]+)\]", arrays)
    return max((math.prod(map(int, s.split(","))) for s in shapes), default=0)


def assert_no_kernel_moves(compiled, kind):
    smallest = {"exact": 48 * 40, "quadrature": 99 * 133}[kind]
    if kind == "exact":
        # Of a bucket all eigenvalues are gathered, n for each of at most 16 matrices.
        assert largest_array(compiled, "all-gather") <= 16 * 40 < smallest
    else:
        # All matrices of 96 rows share a recurrence: 4 + 1 + 2 + 1 + 4 of them.
        moves = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
        assert largest_array(compiled, moves) <= 12 * PROBES * 96 < smallest


def check(function, params, kind="exact"):
    """One compilation, for its text and for its table."""
    compiled = jax.jit(function).lower(params).compile()
    assert_no_kernel_moves(compiled, kind)
    table = compiled(params)
    assert_same[kind](table, alone(kind))
    for column in jax.tree.leaves(table):
        assert column.sharding.is_fully_replicated
        first, *others = (np.asarray(shard.data) for shard in column.addressable_shards)
        for other in others:
            np.testing.assert_array_equal(other, first)


# --- analyses -----------------------------------------------------------------------


def decomposed(params, axes=()):
    """How many matrices of each shape a device decomposes, as it is traced."""
    shapes: Counter[tuple[int, ...]] = Counter()

    def record(buckets):
        for bucket in buckets:
            shapes[bucket.shape[1:]] += len(bucket)
        return GRAM.decompose(buckets)

    def spectra(params):
        def function(kernels):
            layers = expand_stacks(LAYERS, SHAPES["exact"])
            return layer_spectra(kernels, layers, 0.5, Route(record, 1)).exponent

        return on_mesh(mesh_of(params, None), function, params)

    if axes:
        spectra = jax.shard_map(
            spectra, in_specs=P(), out_specs=P(), axis_names={*axes}
        )
    jax.eval_shape(spectra, params)
    return shapes


@pytest.mark.parametrize("axes", [(), ("x",), ("x", "y")], ids=str)
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=str)
def test_each_device_decomposes_its_share(axis_type, axes):
    """Of 9, 5 and 1 matrices of three shapes."""
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        params = place(make_params(), mesh, "replicated" if axes else "mixed")
        own = decomposed(params, axes)
    assert own == {(16, 24): 2, (48, 40): 1, (13, 7): 1}
    assert decomposed(make_params()) == {(16, 24): 9, (48, 40): 5, (13, 7): 1}


@pytest.mark.parametrize("spec", [P("x"), P(None, "x", "y"), P(None, ("x", "y"))])
def test_matrices_in_pieces_have_the_same_scale(spec):
    """Where no mesh is known, XLA alone says how."""
    scales = np.asarray([1, 3, 1e-30, 1e30, 0, 1e-40, np.inf, np.nan], np.float32)
    normal = np.random.default_rng(3).normal(size=(8, 48, 40))
    matrices = normal.astype(np.float32) * scales[:, None, None]
    sharding = NamedSharding(make_mesh(AUTO), spec)
    found = jax.jit(find_scale)([jax.device_put(matrices, sharding)])
    assert_equal(found, jax.device_get(find_scale([jnp.asarray(matrices)])))


@cases(
    ("kind", "placement", "axis_type"),
    ("exact", "replicated", AUTO, "long"),
    ("exact", "fsdp", AUTO),
    ("exact", "mixed", AUTO),
    ("exact", "tensor", EXPLICIT),
    ("exact", "mixed", EXPLICIT),
    ("quadrature", "replicated", AUTO, "long"),
    ("quadrature", "fsdp", AUTO),
    ("quadrature", "mixed", AUTO, "long"),
    ("quadrature", "tensor", EXPLICIT),
    ("quadrature", "mixed", EXPLICIT),
    ("quadrature", "stacked", EXPLICIT, "long"),
)
def test_one_table_wherever_the_kernels_lie(kind, placement, axis_type):
    """The mesh is that of the parameters; kernels stay where they are."""
    params = place(make_params(kind), make_mesh(axis_type), placement)
    check(ANALYZE[kind].__call__, params, kind)


@cases(
    ("kind", "axis_type"), ("exact", AUTO), ("exact", EXPLICIT), ("quadrature", AUTO)
)
def test_a_mesh_that_is_set(kind, axis_type):
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        check(ANALYZE[kind].__call__, place(make_params(kind), mesh, "mixed"), kind)


@one_type
def test_a_mesh_that_is_given(axis_type):
    """Arrays outside of it are copied to it."""
    analyze = tb_optax.layer_analysis(
        LAYERS, min_eigenvalues=5, mesh=make_mesh(axis_type)
    )
    table = analyze(make_params())
    assert_equal(table, alone())
    for column in jax.tree.leaves(table):
        assert len(column.sharding.device_set) == 8


def test_singular_values_and_spectra_are_spread_too():
    params = place(make_params(), make_mesh(EXPLICIT), "mixed")
    analyze = tb_optax.layer_analysis(
        LAYERS, fit=tb_optax.fit_min_ks(), min_eigenvalues=5
    )
    assert_equal(analyze(params), jax.device_get(analyze(make_params())))
    assert_equal(tb_optax.esd(params, LAYERS), tb_optax.esd(make_params(), LAYERS))


@cases(
    ("kind", "manual", "axis_type"),
    ("exact", ("x", "y"), AUTO),
    ("exact", ("x",), AUTO, "long"),
    ("exact", ("x",), EXPLICIT),
    ("quadrature", ("x", "y"), AUTO, "long"),
    ("quadrature", ("x",), AUTO),
)
def test_inside_shard_map(kind, manual, axis_type):
    """Kernels that every device holds; the rest of the mesh may shard them."""
    mesh = make_mesh(axis_type)
    inside = jax.shard_map(
        ANALYZE[kind].__call__,
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        axis_names={*manual},
    )
    check(inside, place(make_params(kind), mesh, "replicated"), kind)


def test_inside_shard_map_without_its_checks_each_device_works_alone():
    mesh = make_mesh(EXPLICIT)
    inside = jax.shard_map(
        ANALYZE["exact"].__call__,
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    assert_equal(jax.jit(inside)(place(make_params(), mesh, "replicated")), alone())


def test_kernels_that_differ_inside_shard_map():
    mesh = make_mesh(EXPLICIT)
    params = place(make_params(), mesh, "fsdp")
    specs = {name: PLACEMENTS["fsdp"].get(name, P()) for name in params}
    inside = jax.shard_map(
        lambda params: ANALYZE["exact"](params).alpha,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"layer 'conv'.*shard_map.*'x', 'y'.*gather"):
        jax.jit(inside)(params)


def test_another_mesh_than_the_one_in_use():
    analyze = tb_optax.layer_analysis(LAYERS, mesh=make_mesh(AUTO, (2,)))
    with (
        jax.set_mesh(make_mesh(AUTO)),
        pytest.raises(ValueError, match=r"mesh = \{'x': 2\}.*\{'x': 4, 'y': 2\}"),
    ):
        analyze(make_params())


@pytest.mark.parametrize("fault", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("kind", ANALYZE)
def test_a_bad_kernel_stays_alone(kind, fault):
    params = make_params(kind)
    params["dense"] = params["dense"] * 0 + np.float32(fault)
    expected = jax.device_get(ANALYZE[kind](params))
    table = ANALYZE[kind](place(params, make_mesh(EXPLICIT), "mixed"))
    assert_same[kind](table, expected)
    bad = np.asarray([layer.path == "dense" for layer in table.layers])
    np.testing.assert_array_equal(table.fitted, ~bad)
    np.testing.assert_array_equal(table.multipliers[bad], 1)
    np.testing.assert_allclose(table.alpha[~bad], alone(kind).alpha[~bad], rtol=1e-4)


# --- trainings ----------------------------------------------------------------------


@functools.cache
def training(kind, spread):
    """A jitted step, and how its optimizer starts."""
    tx = tb_optax.temp_balance(
        optax.sgd(0.01, momentum=0.9), ANALYZE[kind], interval=2, spread=spread
    )

    def step(params, state):
        gradients = jax.tree.map(jnp.cos, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, jax.jit(step)


def run(params, state=None, steps=4, kind="exact", spread=False):
    init, step = training(kind, spread)
    state = init(params) if state is None else state
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@cases(
    ("kind", "spread", "axis_type"),
    ("exact", False, AUTO, "long"),
    ("exact", False, EXPLICIT),
    ("exact", True, AUTO),
    ("exact", True, EXPLICIT, "long"),
    ("quadrature", False, EXPLICIT),
    ("quadrature", True, AUTO),
    ("quadrature", True, EXPLICIT, "long"),
)
def test_training_goes_as_on_one_device(kind, spread, axis_type):
    expected = jax.device_get(run(make_params(kind), kind=kind, spread=spread))
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        sharded = place(make_params(kind), mesh, "mixed")
        init, step = training(kind, spread)
        before = init(sharded)
        after = run(sharded, before, kind=kind, spread=spread)
        types = jax.tree.map(jax.typeof, (sharded, before))
        assert jax.tree.map(jax.typeof, after) == types
        own = tb_optax.get_state(after[1])
        assert all(leaf.sharding.is_fully_replicated for leaf in own)
        assert (own.alpha != alone(kind).alpha).all()
        for name, kernel in after[0].items():
            assert kernel.sharding.is_equivalent_to(sharded[name].sharding, kernel.ndim)
        compiled = step.lower(sharded, before).compile()
        assert_no_kernel_moves(compiled, kind)
    # Pieces pool tables of another width: sums may round differently.
    tolerance = 1e-5 if kind == "quadrature" else 1e-6 if spread else 0
    close = functools.partial(
        np.testing.assert_allclose, rtol=tolerance, atol=tolerance
    )
    after = jax.device_get(after)
    if kind == "exact":
        jax.tree.map(close, after, expected)
        return
    jax.tree.map(close, after[0], expected[0])
    close(*(tb_optax.get_state(state).alpha for _, state in (after, expected)))


@one_type
def test_a_scan_on_a_mesh_that_only_the_parameters_know(axis_type):
    params = place(make_params(), make_mesh(axis_type), "tensor")
    init, step = training("exact", False)

    @jax.jit
    def scan(carry):
        return jax.lax.scan(lambda carry, _: (step(*carry), None), carry, length=4)[0]

    assert_equal(scan((params, init(params))), jax.device_get(run(make_params())))


@pytest.mark.parametrize(("before", "after"), [((4, 2), (2,)), ((2,), (4, 2))], ids=str)
def test_a_checkpoint_moves_to_another_number_of_devices(before, after, tmp_path):
    expected = jax.device_get(run(make_params(), steps=6))

    def placed_on(shape):
        mesh = make_mesh(AUTO, shape)
        placement = "mixed" if len(shape) == 2 else "replicated"
        params = place(make_params(), mesh, placement)
        everywhere = NamedSharding(mesh, P())
        state = training("exact", False)[0](params)
        return params, jax.tree.map(lambda x: jax.device_put(x, everywhere), state)

    reached = run(*placed_on(before), steps=3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", reached)
        checkpointer.wait_until_finished()
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            placed_on(after),
        )
        restored = checkpointer.restore(tmp_path / "state", target)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {
        math.prod(after)
    }
    assert_equal(run(*restored, steps=3), expected)


def test_devices_that_share_their_threads_do_not_wait_for_each_other():
    """Several analyses in one program, on devices with the threads of one host."""
    analyses = [
        ANALYZE["exact"],
        tb_optax.layer_analysis(LAYERS[::2], min_eigenvalues=5),
    ]
    together = jax.jit(lambda params: [analyze(params) for analyze in analyses])
    params = place(make_params(), make_mesh(AUTO), "mixed")
    for _ in range(50):
        table, _ = jax.block_until_ready(together(params))
    assert_equal(table, alone())
