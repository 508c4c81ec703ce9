"""The analysis and the transform on a mesh of eight devices.

`test_sharding` runs this file. Exact spectra are equal to the bit wherever the kernels
lie, and no device gathers one; estimates are equal up to the order of sums, and only
vectors move.
"""

import dataclasses
import functools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from compiled import largest_gathered, largest_moved
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
CONV = MatrixAxes((2,), (3,), pooled=(0, 1))
STACK = MatrixAxes((1,), (2,), stacked=(0,))
HEADS = MatrixAxes((0, 1), (2,))

every_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Kernels and a way to their spectra.

    Attributes:
        name: name.
        zoo: shape and axes of each kernel: some mesh axis divides those of all but one.
        analyze: the analysis.
    """

    name: str
    zoo: Any
    analyze: Any

    def params(self):
        """The kernels, on one device."""
        rng = np.random.default_rng(0)
        return {
            name: np.asarray(
                rng.normal(size=shape) * (1 + np.arange(shape[-1])) ** -0.5, np.float32
            )
            for name, (shape, _) in self.zoo
        }

    @functools.cached_property
    def alone(self):
        """The table of one device."""
        return jax.device_get(self.analyze(self.params()))

    def assert_close(self, found, expected):
        """To the bit; to 1e-5 if estimated, 1e-4 where alpha is below 2.

        There small nodes decide.
        """
        found = jax.device_get(found)
        if self is EXACT:
            jax.tree.map(np.testing.assert_array_equal, found, expected)
            return
        rtol = np.where(expected.alpha < 2, 1e-4, 1e-5)
        for name in ("alpha", "xmin", "stable_rank", "spectral_norm", "frobenius_norm"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (np.abs(one - other) <= rtol * other).all(), name
        np.testing.assert_array_equal(found.tail_size, expected.tail_size)
        spread = np.ptp(expected.alpha) / expected.alpha.max()
        np.testing.assert_allclose(
            found.multipliers, expected.multipliers, atol=4e-4 / spread
        )

    def assert_kernels_stay(self, compiled):
        """No device gathers a kernel, or, of estimates, sends more than vectors."""
        text = str(compiled.as_text())
        if self is EXACT:
            # Of a bucket all eigenvalues are gathered, n for each of 16 matrices.
            assert largest_gathered(text) <= 16 * 40 < 48 * 40
        else:
            # Matrices of 96 rows share a recurrence: 4 + 2 + 1 + 4 + 1 of them.
            assert largest_moved(text) <= 12 * PROBES * 96 < 99 * 133

    def check(self, function, params):
        """One compilation, for its text and for its table."""
        compiled = jax.jit(function).lower(params).compile()
        self.assert_kernels_stay(compiled)
        table = compiled(params)
        self.assert_close(table, self.alone)
        for column in jax.tree.leaves(table):
            assert column.sharding.is_fully_replicated
            first, *others = (np.asarray(x.data) for x in column.addressable_shards)
            for other in others:
                np.testing.assert_array_equal(other, first)


PROBES = 2
ZOO = (
    ("conv", ((3, 3, 12, 24), CONV)),
    ("dense", ((48, 40), DENSE)),
    ("heads", ((4, 8, 24), HEADS)),
    ("odd", ((13, 7), DENSE)),
    ("stack", ((3, 48, 40), STACK)),
)
LAYERS = tuple(Layer(name, axes) for name, (_, axes) in ZOO)
SHAPES = {name: shape for name, (shape, _) in ZOO}
EXACT = Case("exact", ZOO, tb_optax.layer_analysis(LAYERS, min_eigenvalues=5))
# Larger than their vectors.
LARGE = (
    ("conv", ((2, 2, 96, 128), CONV)),
    ("dense", ((192, 96), DENSE)),
    ("fused", ((96, 320), DENSE)),
    ("heads", ((4, 24, 160), HEADS)),
    ("odd", ((99, 133), DENSE)),
    ("stack", ((4, 96, 160), STACK)),
)
ESTIMATED = Case(
    "estimated",
    LARGE,
    tb_optax.layer_analysis(
        [
            *(Layer(name, axes) for name, (_, axes) in LARGE if name != "fused"),
            *(Layer("fused", DENSE, part=(1, i, i + 160)) for i in (0, 160)),
        ],
        spectrum=tb_optax.quadrature(above=90, probes=PROBES, steps=8),
    ),
)
every_case = pytest.mark.parametrize(
    "case", [EXACT, ESTIMATED], ids=lambda case: case.name
)

PLACEMENTS = {
    "replicated": {},
    "fsdp": {
        "dense": P(("x", "y")),
        "fused": P(("x", "y")),
        "stack": P(None, ("x", "y")),
        "heads": P(None, ("x", "y")),
    },
    "tensor": {
        "conv": P(None, None, None, "x"),
        "dense": P(None, "y"),
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
    "stacked": {"conv": P("y", None, "x"), "stack": P("x", "y"), "dense": P(None, "x")},
}


def make_mesh(axis_type, shape=(4, 2)):
    devices = jax.devices()[: math.prod(shape)]
    names = ("x", "y")[: len(shape)]
    types = (axis_type,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


def place(params, mesh, placement):
    specs = PLACEMENTS[placement]
    return {
        name: jax.device_put(kernel, NamedSharding(mesh, specs.get(name, P())))
        for name, kernel in params.items()
    }


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


# --- who decomposes what ------------------------------------------------------------


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
    """Of 9, 4, 1 and 1 matrices of four shapes."""
    mesh, params = make_mesh(axis_type), EXACT.params()
    with jax.set_mesh(mesh):
        placed = place(params, mesh, "replicated" if axes else "mixed")
        shapes = {(12, 24): 2, (48, 40): 1, (32, 24): 1, (13, 7): 1}
        assert decomposed(placed, axes) == shapes
    alone = {(12, 24): 9, (48, 40): 4, (32, 24): 1, (13, 7): 1}
    assert decomposed(params) == alone


@pytest.mark.parametrize("spec", [P("x"), P(None, "x", "y"), P(None, ("x", "y"))])
def test_matrices_in_pieces_have_the_same_scale(spec):
    """Where no mesh is known, XLA alone says how."""
    scales = np.asarray([1, 3, 1e-30, 1e30, 0, 1e-40, np.inf, np.nan], np.float32)
    normal = np.random.default_rng(3).normal(size=(8, 48, 40))
    matrices = normal.astype(np.float32) * scales[:, None, None]
    sharding = NamedSharding(make_mesh(AxisType.Auto), spec)
    found = jax.jit(find_scale)([jax.device_put(matrices, sharding)])
    known = find_scale([jnp.asarray(matrices)])
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get((found, known))[0], known
    )


# --- one table wherever the kernels lie ---------------------------------------------


PLACED = [
    ("replicated", AxisType.Auto),
    ("fsdp", AxisType.Auto),
    ("mixed", AxisType.Auto),
    ("tensor", AxisType.Explicit),
    ("mixed", AxisType.Explicit),
]


@pytest.mark.parametrize(
    ("case", "placement", "axis_type"),
    [
        *((case, *placed) for case in (EXACT, ESTIMATED) for placed in PLACED),
        (ESTIMATED, "stacked", AxisType.Explicit),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_one_table_wherever_the_kernels_lie(case, placement, axis_type):
    """The mesh is that of the parameters."""
    params = place(case.params(), make_mesh(axis_type), placement)
    case.check(case.analyze.__call__, params)


@every_case
@every_type
def test_a_mesh_that_is_set(case, axis_type):
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        case.check(case.analyze.__call__, place(case.params(), mesh, "mixed"))


@every_type
def test_a_mesh_that_is_given(axis_type):
    """Arrays outside of it are copied to it."""
    mesh = make_mesh(axis_type)
    analyze = tb_optax.layer_analysis(LAYERS, min_eigenvalues=5, mesh=mesh)
    table = analyze(EXACT.params())
    EXACT.assert_close(table, EXACT.alone)
    for column in jax.tree.leaves(table):
        assert len(column.sharding.device_set) == 8


def test_singular_values_and_spectra_are_spread_too():
    params = EXACT.params()
    placed = place(params, make_mesh(AxisType.Explicit), "mixed")
    fit = tb_optax.fit_min_ks()
    analyze = tb_optax.layer_analysis(LAYERS, fit=fit, min_eigenvalues=5)
    EXACT.assert_close(analyze(placed), jax.device_get(analyze(params)))
    both = (tb_optax.esd(tree, LAYERS) for tree in (placed, params))
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one, other)


@every_case
@pytest.mark.parametrize(
    ("manual", "axis_type"),
    [
        (("x", "y"), AxisType.Auto),
        (("x",), AxisType.Auto),
        (("x",), AxisType.Explicit),
    ],
    ids=str,
)
def test_inside_shard_map(case, manual, axis_type):
    """Kernels that every device holds; the rest of the mesh may shard them."""
    mesh = make_mesh(axis_type)
    inside = jax.shard_map(
        case.analyze.__call__,
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        axis_names={*manual},
    )
    case.check(jax.jit(inside), place(case.params(), mesh, "replicated"))


def test_inside_shard_map_without_its_checks_each_device_works_alone():
    mesh = make_mesh(AxisType.Explicit)
    inside = jax.shard_map(
        EXACT.analyze.__call__, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    table = jax.jit(inside)(place(EXACT.params(), mesh, "replicated"))
    EXACT.assert_close(table, EXACT.alone)


def test_what_a_mesh_cannot_do_is_an_error():
    """Kernels that differ inside `shard_map`; another mesh than the one in use."""
    mesh = make_mesh(AxisType.Explicit)
    params = place(EXACT.params(), mesh, "fsdp")
    specs = {name: PLACEMENTS["fsdp"].get(name, P()) for name in params}
    inside = jax.shard_map(
        lambda params: EXACT.analyze(params).alpha,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"layer 'dense'.*shard_map.*'x', 'y'.*gather"):
        jax.jit(inside)(params)
    analyze = tb_optax.layer_analysis(LAYERS, mesh=make_mesh(AxisType.Auto, (2,)))
    with (
        jax.set_mesh(make_mesh(AxisType.Auto)),
        pytest.raises(ValueError, match=r"mesh = \{'x': 2\}.*\{'x': 4, 'y': 2\}"),
    ):
        analyze(EXACT.params())


# --- training -----------------------------------------------------------------------


@functools.cache
def training(case, spread):
    """A jitted step, and how its optimizer starts."""
    tx = tb_optax.temp_balance(
        optax.sgd(0.05, momentum=0.9), case.analyze, interval=2, spread=spread
    )

    def step(params, state):
        gradients = jax.tree.map(jnp.cos, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, jax.jit(step)


def run(case, spread, params, state=None, steps=4):
    init, step = training(case, spread)
    state = init(params) if state is None else state
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@every_type
@pytest.mark.parametrize("spread", [False, True])
@every_case
def test_training_goes_as_on_one_device(case, spread, axis_type):
    expected = jax.device_get(run(case, spread, case.params()))
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        sharded = place(case.params(), mesh, "mixed")
        init, step = training(case, spread)
        before = init(sharded)
        after = run(case, spread, sharded, before)
        types = jax.tree.map(jax.typeof, (sharded, before))
        assert jax.tree.map(jax.typeof, after) == types
        own = tb_optax.get_state(after[1])
        assert all(leaf.sharding.is_fully_replicated for leaf in own)
        for name, kernel in after[0].items():
            assert kernel.sharding.is_equivalent_to(sharded[name].sharding, kernel.ndim)
        case.assert_kernels_stay(step.lower(sharded, before).compile())
    assert (own.alpha != case.alone.alpha).all()
    # Pieces pool tables of another width: sums may round differently.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    same = np.testing.assert_array_equal if case is EXACT and not spread else close
    jax.tree.map(same, jax.device_get(after), expected)


@every_type
def test_a_scan_on_a_mesh_that_only_the_parameters_know(axis_type):
    params = place(EXACT.params(), make_mesh(axis_type), "tensor")
    init, step = training(EXACT, False)

    @jax.jit
    def scan(carry):
        return jax.lax.scan(lambda carry, _: (step(*carry), None), carry, length=4)[0]

    expected = jax.device_get(run(EXACT, False, EXACT.params()))
    found = jax.device_get(scan((params, init(params))))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("before", "after"), [((4, 2), (2,)), ((2,), (4, 2))], ids=str)
def test_a_checkpoint_moves_to_another_number_of_devices(before, after, tmp_path):
    expected = jax.device_get(run(EXACT, False, EXACT.params(), steps=6))

    def placed_on(shape):
        mesh = make_mesh(AxisType.Auto, shape)
        placement = "mixed" if len(shape) == 2 else "replicated"
        params = place(EXACT.params(), mesh, placement)
        everywhere = NamedSharding(mesh, P())
        state = training(EXACT, False)[0](params)
        return params, jax.tree.map(lambda x: jax.device_put(x, everywhere), state)

    params, state = run(EXACT, False, *placed_on(before), steps=3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            placed_on(after),
        )
        restored = checkpointer.restore(tmp_path / "state", target)
    devices = {len(x.sharding.device_set) for x in jax.tree.leaves(restored)}
    assert devices == {math.prod(after)}
    found = jax.device_get(run(EXACT, False, *restored, steps=3))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_devices_that_share_their_threads_do_not_wait_for_each_other():
    """Several analyses in one program, on devices with the threads of one host."""
    mesh = make_mesh(AxisType.Auto)
    some = tb_optax.layer_analysis(LAYERS[::2], min_eigenvalues=5)
    together = jax.jit(lambda params: [f(params) for f in (EXACT.analyze, some)])
    params = place(EXACT.params(), mesh, "mixed")
    for _ in range(50):
        table, _ = jax.block_until_ready(together(params))
    EXACT.assert_close(table, EXACT.alone)
