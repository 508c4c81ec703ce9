"""Training loops of Flax linen, Flax nnx, Equinox and Haiku against a plain one."""
# ruff: noqa: D101, D102  # The names of the models and their methods say what they are.

import functools
from typing import Any

import configurations as table
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec

import tb_optax

INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
TARGETS = jnp.sin(INPUTS @ jnp.arange(24.0).reshape(6, 4))
ANALYZE = tb_optax.layer_analysis(min_eigenvalues=4)
OPTIMIZER = optax.sgd(0.2, momentum=0.9)


def mean_square(outputs):
    return jnp.mean((outputs - TARGETS) ** 2)


class LinenMLP(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, (None, "model"))
        for width in (8, 7):
            x = nn.tanh(nn.Dense(width, kernel_init=init)(x))
        return nn.Dense(4, kernel_init=init)(x)


class Linen:
    """A `TrainState`."""

    model = LinenMLP()

    def __init__(self, transform):
        params = self.model.init(jax.random.key(0), INPUTS)["params"]
        self.state = TrainState.create(
            apply_fn=self.model.apply, params=params, tx=transform
        )

    @functools.partial(jax.jit, static_argnums=0)
    def jitted(self, state):
        return state.apply_gradients(grads=jax.grad(self.loss)(state.params))

    def step(self):
        self.state = self.jitted(self.state)

    @property
    def params(self):
        return self.state.params

    @property
    def opt_state(self):
        return self.state.opt_state

    @opt_state.setter
    def opt_state(self, value):
        self.state = self.state.replace(opt_state=value)

    def loss(self, params):
        return mean_square(self.model.apply({"params": params}, INPUTS))


class BoxedLinen(Linen):
    """The same with `nn.Partitioned` leaves."""

    model = LinenMLP(boxed=True)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(
            [nnx.Linear(*sizes, rngs=rngs) for sizes in ((6, 8), (8, 7), (7, 4))]
        )
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.dropout(nnx.tanh(layer(x)))
        return self.layers[-1](x)


class Nnx:
    """An `nnx.Optimizer` under `nnx.jit`."""

    def __init__(self, transform):
        self.model = NnxMLP(nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, transform, wrt=nnx.Param)

    @staticmethod
    @nnx.jit
    def jitted(model, optimizer):
        grads = nnx.grad(lambda model: mean_square(model(INPUTS)))(model)
        optimizer.update(model, grads)

    def step(self):
        self.jitted(self.model, self.optimizer)

    @property
    def state(self):
        return nnx.as_pure(nnx.state((self.model, self.optimizer)))

    @state.setter
    def state(self, arrays):
        nnx.update((self.model, self.optimizer), arrays)

    @property
    def params(self):
        return nnx.as_pure(nnx.state(self.model, nnx.Param))

    @property
    def opt_state(self):
        return self.optimizer.opt_state

    @opt_state.setter
    def opt_state(self, value):
        self.optimizer.opt_state = value

    def loss(self, params):
        graph, _, rest = nnx.split(self.model, nnx.Param, ...)
        return mean_square(nnx.merge(graph, params, rest)(INPUTS))


class FunctionalNnx(Nnx):
    """The graph taken apart by hand: pure functions and `jax.jit`."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def pure(self, graph, state):
        model, optimizer = nnx.merge(graph, state)
        grads = nnx.grad(lambda model: mean_square(model(INPUTS)))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    def step(self):
        pair = (self.model, self.optimizer)
        nnx.update(pair, self.pure(*nnx.split(pair)))


def arrays_of(model):
    return eqx.filter(model, eqx.is_inexact_array)


class Equinox:
    """A model with functions among its leaves, filtered for `init` and `update`."""

    seen_by_update = staticmethod(arrays_of)

    def __init__(self, transform):
        self.model = eqx.nn.MLP(6, 4, 8, 2, activation=jnp.tanh, key=jax.random.key(0))
        self.transform = transform
        self.opt_state = transform.init(self.params)
        self.jitted = eqx.filter_jit(self.pure)

    def pure(self, model, opt_state):
        grads = eqx.filter_grad(self.loss)(model)
        params = self.seen_by_update(model)
        updates, opt_state = self.transform.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    def step(self):
        self.model, self.opt_state = self.jitted(self.model, self.opt_state)

    @property
    def params(self):
        return arrays_of(self.model)

    def loss(self, params):
        return mean_square(jax.vmap(eqx.combine(params, self.model))(INPUTS))


class RawEquinox(Equinox):
    """The model itself as params of `update`, functions and all."""

    seen_by_update = staticmethod(lambda model: model)


def haiku_mlp(x):
    return hk.nets.MLP([8, 7, 4], activation=jnp.tanh)(x)


class Haiku:
    """Pure functions."""

    apply = staticmethod(hk.without_apply_rng(hk.transform(haiku_mlp)).apply)

    def __init__(self, transform):
        self.params = hk.transform(haiku_mlp).init(jax.random.key(0), INPUTS)
        self.opt_state = transform.init(self.params)
        self.jitted = jax.jit(functools.partial(self.pure, transform.update))

    def pure(self, update, params, opt_state):
        updates, opt_state = update(jax.grad(self.loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def step(self):
        self.params, self.opt_state = self.jitted(self.params, self.opt_state)

    def loss(self, params):
        return mean_square(self.apply(params, INPUTS))


FRAMEWORKS = (Linen, BoxedLinen, Nnx, FunctionalNnx, Equinox, RawEquinox, Haiku)


def path_of(keys):
    return jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")


def by_path(params) -> dict[str, jax.Array]:
    return {path_of(keys): leaf for keys, leaf in jax.tree.leaves_with_path(params)}


def plain_training(run, layers, interval, steps):
    """The same training written out, on a dict of arrays by path."""
    tree = run.params
    flat: Any = by_path(tree)
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)

    def loss(flat):
        def leaf_of(keys, _):
            return flat[path_of(keys)]

        return run.loss(jax.tree_util.tree_map_with_path(leaf_of, tree))

    gradient = jax.jit(jax.grad(loss))
    state = OPTIMIZER.init(flat)
    analysis = analyze(flat)
    for i in range(steps):
        if i % (interval or 3) == 0:
            analysis = analyze(flat)
        updates, state = OPTIMIZER.update(gradient(flat), state)
        multipliers = analysis.leaf_multipliers(flat)
        updates = jax.tree.map(lambda u, m: u * m, updates, multipliers)
        flat = optax.apply_updates(flat, updates)
    return flat, analysis


@pytest.mark.parametrize(
    ("framework", "interval"),
    # A refresh by the host is the same for all that hold one kind of state.
    [(own, 3) for own in FRAMEWORKS] + [(own, None) for own in (Linen, Nnx, Equinox)],
)
def test_training_is_the_plain_loop(framework, interval, compilations):
    """And a refresh by the host compiles nothing new, after the second step."""
    steps = 5
    run = framework(tb_optax.temp_balance(OPTIMIZER, ANALYZE, interval=interval))
    layers = tb_optax.find_layers(run.params)
    assert len(layers) == 3
    assert all(len(layer.follows) == 1 for layer in layers)
    expected, analysis = plain_training(run, layers, interval, steps)
    before, seen = float(run.loss(run.params)), []
    for i in range(steps):
        if interval is None and i % 3 == 0:
            analyzed = ANALYZE(run.params)
            run.opt_state = tb_optax.set_multipliers(run.opt_state, analyzed)
        run.step()
        seen.append(compilations())
    assert seen[-1] == seen[1]
    table.assert_close(by_path(run.params), expected, rtol=1e-4)
    assert run.loss(run.params) < before

    state = tb_optax.get_state(run.opt_state)
    assert isinstance(state, tb_optax.TempBalanceState)
    assert all(isinstance(field, jax.Array) for field in state)
    assert state.count == steps
    table.assert_close(state.multipliers, analysis.multipliers, rtol=1e-4)
    table.assert_close(state.alpha, analysis.alpha, rtol=1e-4)
    table.assert_equal(tb_optax.get_multipliers(run.opt_state), state.multipliers)
    log = tb_optax.log_dict(run.opt_state, layers)
    assert [float(value) for value in log.values()] == [
        *state.alpha.tolist(),
        *state.multipliers.tolist(),
    ]


@pytest.mark.parametrize("params", [nnx.state, nnx.as_pure], ids=["nodes", "arrays"])
def test_nnx_nodes_and_plain_arrays_have_one_state(params):
    """`nnx.Optimizer` shows nodes to `init`, and plain arrays to `update`."""
    state = nnx.state(NnxMLP(nnx.Rngs(0)), nnx.Param)
    plain = nnx.as_pure(state)
    tree = {nnx.state: state, nnx.as_pure: plain}[params]
    transform = tb_optax.scale_by_temp_balance(ANALYZE, interval=1)
    found = transform.init(tree)
    table.assert_equal(found, transform.init(plain))
    updates, _ = transform.update(plain, found, plain)
    analysis = ANALYZE(tree)
    multipliers = analysis.leaf_multipliers(plain)
    table.assert_close(updates, jax.tree.map(lambda u, m: u * m, plain, multipliers))


def test_nnx_set_multipliers_keeps_the_kind_of_every_variable():
    run = Nnx(tb_optax.temp_balance(OPTIMIZER, ANALYZE, interval=None))
    before = run.opt_state
    run.opt_state = tb_optax.set_multipliers(before, [1.0, 0.5, 2.0])
    assert jax.tree.structure(run.opt_state) == jax.tree.structure(before)
    assert tb_optax.get_multipliers(run.opt_state).tolist() == [1.0, 0.5, 2.0]
    assert tb_optax.get_multipliers(before).tolist() == [1.0, 1.0, 1.0]
    run.step()
    assert tb_optax.get_multipliers(run.opt_state).tolist() == [1.0, 0.5, 2.0]


@pytest.mark.parametrize("framework", [Linen, Nnx], ids=lambda x: x.__name__)
def test_training_resumes_from_a_checkpoint(framework, tmp_path):
    """Of a `TrainState`, or of plain arrays of model and optimizer."""

    def new():
        return framework(tb_optax.temp_balance(OPTIMIZER, ANALYZE, interval=3))

    run, resumed = new(), new()
    for _ in range(2):
        run.step()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", run.state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: resumed.state)
        resumed.state = checkpointer.restore(tmp_path / "state", target)
    table.assert_equal(
        tb_optax.get_state(resumed.opt_state), tb_optax.get_state(run.opt_state)
    )
    for _ in range(3):
        run.step()
        resumed.step()
    table.assert_equal(by_path(resumed.params), by_path(run.params))


def mesh():
    return jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))


def test_linen_partition_specs_leave_our_vectors_whole():
    run = BoxedLinen(tb_optax.temp_balance(OPTIMIZER, ANALYZE, interval=1))
    specs = nn.get_partition_spec(run.state)
    assert specs.params["Dense_0"]["kernel"] == PartitionSpec(None, "model")
    assert set(tb_optax.get_state(specs.opt_state)) == {PartitionSpec()}
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh(), spec), specs)

    @functools.partial(jax.jit, out_shardings=shardings)
    def sharded():
        return run.state

    table.assert_equal(
        tb_optax.get_state(sharded().opt_state), tb_optax.get_state(run.opt_state)
    )


@pytest.mark.filterwarnings("ignore:only one layer can be tuned")
def test_nnx_sharding_metadata_leaves_our_vectors_whole():
    transform = tb_optax.temp_balance(OPTIMIZER, ANALYZE, interval=1)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    with jax.set_mesh(mesh()):
        model = nnx.Linear(8, 6, kernel_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 8)))))(model)
        optimizer.update(model, grads)
    state = tb_optax.get_state(optimizer.opt_state)
    assert state.count == 1
    assert state.multipliers.sharding.is_fully_replicated


def test_equinox_under_multi_steps_is_filtered_first():
    """`MultiSteps` adds up what it is given, functions among them."""
    model = eqx.nn.MLP(8, 8, 8, 2, key=jax.random.key(0))
    arrays = arrays_of(model)
    transform = tb_optax.temp_balance(OPTIMIZER, ANALYZE, interval=1)
    several = optax.MultiSteps(transform, 2)
    state = several.init(arrays)
    for expected in (False, True):
        updates, state = several.update(arrays, state, arrays)
        moved = eqx.apply_updates(model, updates)
        same = jnp.array_equal(moved.layers[0].weight, model.layers[0].weight)
        assert bool(same) != expected
    assert {0.5, 1.5} <= set(tb_optax.get_multipliers(state).tolist())
    raw: Any = model
    with pytest.raises(TypeError):
        several.update(arrays, several.init(raw), raw)
