"""The parts of the family: columns, groups, maps, analyzed trees, fixed factors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family import seeing_layers

import tb_optax
from tb_optax import Layer, MatrixAxes, linear, mean_one
from tb_optax.marchenko_pastur import random_alpha

DENSE = MatrixAxes((0,), (1,))
SHAPES = {
    "h.0.a": (16, 24),
    "h.0.b": (16, 16),
    "h.1.a": (16, 24),
    "h.1.b": (20, 20),
    "head": (16, 40),
}
LAYERS = tuple(Layer(name, DENSE) for name in SHAPES)


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape) * (1 + np.arange(shape[1])) ** -p)
        for p, (name, shape) in zip(
            (0.3, 0.9, 0.6, 0.1, 0.5), SHAPES.items(), strict=True
        )
    }


def analysis(params=None, layers=LAYERS, **options):
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=1, **options)
    return analyze(make_params() if params is None else params)


# --- columns ------------------------------------------------------------------------


def test_entropies_are_those_of_the_eigenvalues():
    params = make_params() | {"head": jnp.zeros((16, 40))}
    for metric in ("entropy", "alpha"):  # By singular values, and by Gram matrices.
        table = analysis(params, metric=metric)
        for i, name in enumerate([*SHAPES][:-1]):
            sigma = np.linalg.svd(np.asarray(params[name], float), compute_uv=False)
            p = sigma**2 / np.sum(sigma**2) + 6e-5
            entropy = -np.sum(p * np.log(p)) / np.log(len(sigma) + 6e-5)
            np.testing.assert_allclose(table.entropy[i], entropy, rtol=1e-4)
            p = sigma / sigma.sum()
            rank = np.exp(-np.sum(p * np.log(p)))
            np.testing.assert_allclose(table.effective_rank[i], rank, rtol=1e-3)
        assert table.entropy[-1] == table.effective_rank[-1] == 0


def test_entropies_do_not_depend_on_the_scale():
    table = analysis(layers=LAYERS[:2])
    huge = analysis({name: 1e25 * w for name, w in make_params().items()}, LAYERS[:2])
    np.testing.assert_allclose(huge.entropy, table.entropy, rtol=1e-5)
    np.testing.assert_allclose(huge.effective_rank, table.effective_rank, rtol=1e-5)


def test_the_error_of_alpha_is_that_of_independent_eigenvalues():
    """Of Pareto samples alpha scatters by it."""
    rng = np.random.default_rng(0)
    logs = np.sort(rng.exponential(1 / 1.5, (200, 400)), axis=-1)
    law = tb_optax.fit_median(1e6)(jnp.asarray(logs), jnp.ones((200, 400), bool))
    error = np.mean((np.asarray(law.alpha) - 1) / np.sqrt(np.asarray(law.tail_size)))
    np.testing.assert_allclose(np.std(law.alpha), error, rtol=0.15)
    table = analysis()
    expected = (table.alpha - 1) / np.sqrt(table.tail_size)
    np.testing.assert_allclose(table.alpha_error, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("q", "alpha"),
    [(1, 2.1217), (3 / 4, 2.3507), (1 / 2, 2.7058), (1 / 4, 3.4546), (1 / 16, 5.878)],
)
def test_random_alpha_has_the_known_limits(q, alpha):
    m = 2**20
    found = random_alpha(int(q * m), m, int(q * m), tb_optax.fit_median())
    np.testing.assert_allclose(found, alpha, rtol=1e-4)


CONV = MatrixAxes((2,), (3,), pooled=(0, 1))
RANDOM = {
    "square": (64, 64),
    "small": (16, 128),
    "wide": (256, 1024),
    "tall": (4096, 256),
    "conv": (3, 3, 64, 64),
    "thin": (5, 5, 16, 48),
}


@pytest.mark.parametrize("fit", [tb_optax.fit_median(), tb_optax.fit_median(1.5)])
@pytest.mark.parametrize("name", RANDOM)
def test_an_untrained_matrix_has_the_relative_alpha_one(name, fit):
    """Of ten seeds, each within 8/(n·sqrt(k)), and their mean within 3/n."""
    *positions, inputs, outputs = RANDOM[name]
    matrices, n, m = int(np.prod(positions)), *sorted((inputs, outputs))
    drawn = np.random.default_rng(0).normal(size=(10, matrices, n, m))
    eigenvalues = np.linalg.eigvalsh(drawn @ drawn.swapaxes(-1, -2)).reshape(10, -1)
    logs = jnp.asarray(np.log(np.sort(eigenvalues, axis=-1)))
    alpha = np.asarray(fit(logs, jnp.ones(logs.shape, bool)).alpha)
    relative = alpha / random_alpha(n, m, matrices * n, fit)
    assert np.abs(relative - 1).max() <= 8 / (n * np.sqrt(matrices))
    assert abs(relative.mean() - 1) <= 3 / n


def test_the_table_has_the_random_alpha_of_each_shape():
    layers = [Layer(x, CONV if len(s) == 4 else DENSE) for x, s in RANDOM.items()]
    rng = np.random.default_rng(1)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in RANDOM.items()
    }
    table = analysis(params, layers, metric=tb_optax.relative_alpha)
    relative = tb_optax.relative_alpha(table)
    bounds = [8 / (min(s[-2:]) * np.sqrt(np.prod(s[:-2]))) for s in RANDOM.values()]
    assert (np.abs(relative - 1) <= bounds).all(), relative


def test_relative_alpha_needs_the_median_fit():
    fit = tb_optax.fit_min_ks()
    with pytest.raises(ValueError, match="relative_alpha needs fit_median"):
        tb_optax.layer_analysis(fit=fit, metric=tb_optax.relative_alpha)
    table = analysis(fit=fit)
    np.testing.assert_array_equal(table.random_alpha, 0)
    with pytest.raises(ValueError, match="relative_alpha needs fit_median"):
        tb_optax.relative_alpha(table)


# --- groups and maps ----------------------------------------------------------------


def test_groups_share_the_map_of_their_means():
    plain, table = analysis(), analysis(groups=tb_optax.by_block)
    means = np.asarray(plain.alpha[:4]).reshape(2, 2).mean(axis=1)
    expected = np.repeat(np.where(means == means.max(), 1.5, 0.5), 2)
    np.testing.assert_allclose(table.multipliers, [*expected, 1], rtol=1e-6)
    assert table.tuned.tolist() == [True] * 4 + [False]


def test_a_dead_layer_is_left_out_of_its_group():
    params = make_params() | {"h.0.a": jnp.full((16, 24), jnp.inf)}
    table = analysis(params, groups=tb_optax.by_block, assign=tb_optax.sigmoid())
    alone = analysis(params, groups=None)
    x = alone.alpha[1] - (alone.alpha[1] + alone.alpha[2:4].mean()) / 2
    power = (1.0 if x > 0 else 2.0) * (1 / (1 + np.exp(-10 * x)) - 0.5)
    np.testing.assert_allclose(table.multipliers[1], 10**power, rtol=1e-4)
    assert table.multipliers[0] == table.multipliers[4] == 1
    gone = params | {"h.0.b": jnp.zeros((16, 16))}
    table = analysis(gone, groups=tb_optax.by_block)
    np.testing.assert_array_equal(table.multipliers, 1)


def test_slices_of_stacks_are_blocks_by_their_index():
    stack = MatrixAxes((1,), (2,), stacked=(0,))
    layers = [Layer("attn/w", stack, index=(i,)) for i in range(2)]
    assert [tb_optax.by_block(layer) for layer in layers] == ["[0]", "[1]"]
    assert tb_optax.by_block(Layer("conv2d/kernel", DENSE)) is None
    assert tb_optax.by_block(Layer("fc1/kernel", DENSE)) == "fc1"


@pytest.mark.parametrize("ungrouped", [False, True])
def test_the_mean_of_the_tuned_multipliers_is_one(ungrouped):
    sizes = np.asarray([np.prod(shape) for shape in SHAPES.values()])
    for by_size in (False, True):
        assign = mean_one(linear(1, 3), by_size=by_size, ungrouped=ungrouped)
        table = analysis(assign=assign, groups=tb_optax.by_block)
        weights = sizes if by_size else np.ones(5)
        kept = slice(None) if ungrouped else slice(4)
        mean = np.average(table.multipliers[kept], weights=weights[kept])
        np.testing.assert_allclose(mean, 1, rtol=1e-5)
        assert (table.multipliers[4] == 1) == (not ungrouped)


def test_a_map_may_see_layers_and_sizes():
    seen = []

    def assign(metric, tuned, rows):
        seen.extend(rows)
        return jnp.where(tuned, 2.0, 1) + 0 * metric

    seeing_layers(assign)
    table = analysis(assign=assign)
    np.testing.assert_array_equal(table.multipliers, 2)
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    assert seen == [*zip(LAYERS, sizes, strict=True)]
    seen.clear()
    analysis(assign=assign, groups=tb_optax.by_block)
    assert seen == [(LAYERS[0], sizes[0] + sizes[1]), (LAYERS[2], sizes[2] + sizes[3])]


def run_once(tx: Any, params: Any) -> Any:
    """Updates and state after one update, of the parameters themselves."""
    return tx.update(params, tx.init(params), params)


# --- analyzed trees, and factors by name ----------------------------------------------


def test_low_rank_updates_take_the_multiplier_of_what_they_update():
    """LoRA: W + B·A is analyzed, W is frozen, B and A are scaled."""
    frozen = make_params()
    rng = np.random.default_rng(3)
    params = {
        f"{name}/{part}": jnp.asarray(rng.normal(size=size), jnp.float32)
        for name, (rows, columns) in SHAPES.items()
        for part, size in (("down", (rows, 2)), ("up", (2, columns)))
    }

    def whole(params):
        return {
            name: w + params[f"{name}/down"] @ params[f"{name}/up"]
            for name, w in frozen.items()
        }

    layers = [Layer(name, DENSE, (f"{name}/down", f"{name}/up")) for name in SHAPES]
    analyze = tb_optax.layer_analysis(layers, kernels=whole, min_eigenvalues=1)
    expected = analysis(whole(params))
    table = analyze(params)
    np.testing.assert_allclose(table.multipliers, expected.multipliers, rtol=1e-4)
    tx = tb_optax.scale_by_temp_balance(analyze, interval=2, spread=True)
    updates, state = run_once(tx, params)
    np.testing.assert_allclose(state.multipliers, expected.multipliers, rtol=1e-4)
    for i, name in enumerate(SHAPES):
        scaled = params[f"{name}/up"] * expected.multipliers[i]
        np.testing.assert_allclose(updates[f"{name}/up"], scaled, rtol=1e-4)
    _, state = jax.jit(tx.update)(params, state, params)
    assert state.count == 2


def test_the_change_of_a_fine_tuning_is_analyzed_in_place():
    """W - W_0 has the paths of the parameters: its layers own their leaves."""
    start, params = make_params(), make_params(7)
    analyze = tb_optax.layer_analysis(
        LAYERS,
        kernels=lambda own: jax.tree.map(jnp.subtract, own, start),
        min_eigenvalues=1,
    )
    table = analyze(params)
    expected = analysis(jax.tree.map(jnp.subtract, params, start))
    np.testing.assert_allclose(table.multipliers, expected.multipliers, rtol=1e-5)
    tx = tb_optax.scale_by_temp_balance(analyze, interval=1)
    updates, _ = run_once(tx, params)
    for i, name in enumerate(SHAPES):
        scaled = params[name] * expected.multipliers[i]
        np.testing.assert_allclose(updates[name], scaled, rtol=1e-4)
    missing = tb_optax.layer_analysis([Layer("nowhere", DENSE)], kernels=lambda p: p)
    with pytest.raises(ValueError, match="'nowhere' is not in the parameters"):
        missing(params)


def test_a_fixed_factor_by_name_leaves_the_ranking_alone():
    """The log has it where it is told of it, and the rates that the updates show."""
    params = make_params()
    factors = {name: 0.1 if name == "head" else 1.0 for name in params}
    analyze = tb_optax.layer_analysis(LAYERS, min_eigenvalues=1)
    balance = tb_optax.scale_by_temp_balance(analyze, interval=1)
    fixed = optax.masked(optax.scale(0.1), {name: f < 1 for name, f in factors.items()})
    updates, state = run_once(optax.chain(optax.sgd(0.5), balance, fixed), params)
    plain = tb_optax.log_dict(state, LAYERS)
    logged = tb_optax.log_dict(
        state, LAYERS, learning_rate=0.5, factor=lambda layer: factors[layer.path]
    )
    expected = analyze(params).multipliers
    for i, name in enumerate(SHAPES):
        np.testing.assert_allclose(plain[f"multiplier/{name}"], expected[i], rtol=1e-6)
        assert logged[f"multiplier/{name}"] == plain[f"multiplier/{name}"]
        np.testing.assert_allclose(logged[f"factor/{name}"], factors[name])
        rate = logged[f"learning_rate/{name}"]
        np.testing.assert_allclose(updates[name], -rate * params[name], rtol=1e-5)


# --- recipes ------------------------------------------------------------------------


def test_recipes_are_their_parts():
    params = make_params()
    recipes = tb_optax.recipes
    embedding = [Layer("h.0.b", DENSE, ("bias",)), *LAYERS[:1], *LAYERS[2:]]
    own = params | {"bias": jnp.ones(16)}
    ends = {"ends": ("h.0.b", "head"), "total_steps": 30, "share": 0.2}
    tx: Any = recipes.llr(embedding, interval=3, ramp=2, min_eigenvalues=1, **ends)
    state, seen = tx.init(own), []
    for _ in range(12):
        _, state = tx.update(own, state, own)
        seen.append(np.asarray(state.multipliers))
    assert seen[-1].max() == seen[-1][0] == seen[-1][-1] == 3
    np.testing.assert_allclose(seen[0], (1 + seen[-1]) / 2, rtol=1e-5)
    assert state.refreshed == 3  # Refreshes at 0 and 3; 6 is past the first fifth.
    np.testing.assert_array_equal(tx.update(own, state, own)[0]["bias"], 1)
    hybrid = recipes.model_balancing(
        LAYERS, interval=1, weight_decay=0.1, min_eigenvalues=1
    )
    analyze = tb_optax.layer_analysis(
        LAYERS,
        fit=tb_optax.fit_median(1.5),
        assign=tb_optax.sigmoid(),
        groups=tb_optax.by_block,
        min_eigenvalues=1,
    )
    parts = tb_optax.scale_by_temp_balance(analyze, interval=1, weight_decay=0.1)
    for name in params:
        one, other = (run_once(tx, params)[0] for tx in (hybrid, parts))
        np.testing.assert_array_equal(one[name], other[name])
