"""A traced stack gives exactly what the same layers give unstacked."""

from typing import Any

import configurations as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax import lax
from notation import array, arrays
from zoo import conv

import tb_optax

X = jnp.ones((4, 8))
DEPTH = 3


def norm(x, scale, offset):
    x = x - x.mean(0)
    return x * lax.rsqrt((x**2).mean(0) + 1e-5) * scale + offset


def block(x, params):
    """Batch norms behind the first product, and before the second."""
    y = jnp.tanh(norm(x @ params["first"] + params["bias"], *params["norm"]))
    return x + y @ params["second"]


def scanned(params, x):
    x = x @ params["stem"]
    x = lax.scan(lambda x, p: (block(x, p), None), x, params["blocks"])[0]
    return x @ params["head"]


def unrolled(params, x):
    x = x @ params["stem"]
    for slice_ in params["blocks"]:
        x = block(x, slice_)
    return x @ params["head"]


def side_by_side(params, x):
    """Experts on one input, the mean of their outputs."""
    hidden = jnp.einsum("td,edf->tef", x @ params["stem"], params["blocks"]["first"])
    hidden = jnp.tanh(hidden + params["blocks"]["bias"])
    out = jnp.einsum("tef,efd->ted", hidden, params["blocks"]["second"])
    return out.mean(1) @ params["head"]


def apart(params, x):
    x = x @ params["stem"]
    hidden = [jnp.tanh(x @ p["first"] + p["bias"]) for p in params["blocks"]]
    outs = [h @ p["second"] for h, p in zip(hidden, params["blocks"], strict=True)]
    return sum(outs) / DEPTH @ params["head"]


def make_blocks(norms):
    rng = np.random.default_rng(0)
    blocks = []
    for i in range(DEPTH):
        members: dict[str, Any] = {
            "first": table.random_kernel(10 + i, (8, 6), 0.5 * i),
            "bias": rng.normal(size=6),
            "second": table.random_kernel(20 + i, (6, 8), 1 - 0.3 * i),
        }
        if norms:
            members["norm"] = (rng.normal(size=6), rng.normal(size=6))
        blocks.append(
            jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), members)
        )
    return blocks


def with_ends(blocks):
    ends = {
        "stem": table.random_kernel(1, (8, 8)),
        "head": table.random_kernel(2, (8, 5)),
    }
    return {k: jnp.asarray(v, jnp.float32) for k, v in ends.items()} | {
        "blocks": blocks
    }


def stack(blocks):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def train(forward, params, norms, steps=4):
    """Steps of training on a loss that uses every parameter."""
    layers = tb_optax.trace_layers(forward, params, X, norms=norms)[1:-1]
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    transform = tb_optax.temp_balance(
        optax.sgd(0.05, momentum=0.9), analyze, interval=2
    )
    state = transform.init(params)
    step = table.make_step(transform)
    for _ in range(steps):
        params, state = step(params, state)
    return layers, params, tb_optax.get_state(state), analyze


@pytest.mark.parametrize("norms", ["after", "before"])
def test_a_scanned_model_trains_as_the_unrolled_one(norms):
    blocks = make_blocks(norms=True)
    layers, params, state, analyze = train(scanned, with_ends(stack(blocks)), norms)
    _, others, other_state, _ = train(unrolled, with_ends(blocks), norms)
    assert [layer.name for layer in layers] == [
        f"blocks/{name}[{i}]" for i in range(DEPTH) for name in ("first", "second")
    ]
    assert len(set(state.multipliers.tolist())) == 2 * DEPTH
    table.assert_close(state, other_state)
    table.assert_close(params["blocks"], stack(others["blocks"]))
    # The first and the last layer are left out in both.
    for name in ("stem", "head"):
        table.assert_close(params[name], others[name])
    multipliers = analyze(params).leaf_multipliers(params)
    assert multipliers["blocks"]["first"].shape == (DEPTH, 1, 1)
    assert multipliers["blocks"]["norm"][0].shape == (DEPTH, 1)


def test_norms_that_follow_nothing_keep_one_multiplier():
    params = with_ends(stack(make_blocks(norms=True)))
    layers = tb_optax.trace_layers(scanned, params, X, norms="none")
    analyze = tb_optax.layer_analysis(layers, min_eigenvalues=4)
    multipliers = jax.eval_shape(lambda p: analyze(p).leaf_multipliers(p), params)
    assert multipliers["blocks"]["bias"].shape == (DEPTH, 1)
    assert multipliers["blocks"]["norm"][0].shape == ()


def test_experts_train_as_separate_layers():
    blocks = make_blocks(norms=False)
    layers, params, state, _ = train(side_by_side, with_ends(stack(blocks)), "after")
    _, others, other_state, _ = train(apart, with_ends(blocks), "after")
    assert [layer.name for layer in layers] == ["blocks/first", "blocks/second"]
    table.assert_close(params["blocks"], stack(others["blocks"]))
    np.testing.assert_allclose(
        np.sort(state.multipliers), np.sort(other_state.multipliers), rtol=1e-5
    )


def test_every_slice_has_a_row_in_the_description():
    params = with_ends(stack(make_blocks(norms=True)))
    layers = tb_optax.trace_layers(scanned, params, X)
    rows = {row["leaf"]: row for row in tb_optax.describe(params, layers)}
    first = "blocks/first[0], blocks/first[1], blocks/first[2]"
    assert rows["blocks/first"]["layer"] == first
    assert rows["blocks/bias"]["layer"] == first
    assert rows["blocks/norm/0"]["layer"] == first
    assert rows["blocks/norm/0"]["note"] == "follows"
    assert rows["head"]["layer"] == "head"


def resnet_block(params, x):
    """PyTorch's names; the norm of the shortcut has none of `bnN`."""

    def normed(x, module, name):
        x = conv(x, params[module]["kernel"])
        return norm(x, params[name]["scale"], params[name]["bias"])

    y = jnp.maximum(normed(x, "conv1", "bn1"), 0)
    y = normed(y, "conv2", "bn2")
    return jnp.maximum(y + normed(x, "shortcut_0", "shortcut_1"), 0)


def test_both_published_associations():
    """By order of execution, and by name: `bn1` with `conv1`."""
    pairs = {"conv1": "bn1", "conv2": "bn2", "shortcut_0": "shortcut_1"}
    params = {name: {"kernel": "3x3x6x6"} for name in pairs}
    params |= {name: {"scale": "6", "bias": "6"} for name in pairs.values()}
    params = arrays(params)
    traced = tb_optax.trace_layers(resnet_block, params, array(2, 5, 5, 6))
    modules = [
        (name, kind)
        for pair in pairs.items()
        for name, kind in zip(pair, ("Conv2d", "BatchNorm2d"), strict=True)
    ]

    def followers(layers):
        return {
            path.split("/")[0]: layer.path.split("/")[0]
            for layer in layers
            for path in layer.follows
        }

    by_order = reference.norm_by_order(modules, "BatchNorm2d", "Conv2d")
    assert followers(traced) == by_order
    named = {layer.path: layer for layer in tb_optax.find_layers(params)}
    by_name = reference.norm_by_name(modules)
    assert followers([named[layer.path] for layer in traced]) == by_name
    assert [layer.path for layer in traced] == [f"{name}/kernel" for name in pairs]
