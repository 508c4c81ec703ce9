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


def blocks():
    """Parameters of each block, with spectra of different tails."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(DEPTH):
        members: dict[str, Any] = {
            "first": table.random_kernel(10 + i, (8, 6), 0.5 * i),
            "bias": rng.normal(size=6),
            "second": table.random_kernel(20 + i, (6, 8), 1 - 0.3 * i),
            "norm": (rng.normal(size=6), rng.normal(size=6)),
        }
        found.append(jax.tree.map(jnp.float32, members))
    return found


def with_ends(blocks):
    ends = {"stem": (8, 8), "head": (8, 5)}
    made = {name: table.random_kernel(1, shape) for name, shape in ends.items()}
    return {**jax.tree.map(jnp.float32, made), "blocks": blocks}


def stack(blocks):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def analysis_of(forward, params, norms="after"):
    """An analysis of all layers but the first and the last one."""
    layers = tb_optax.trace_layers(forward, params, X, norms=norms)[1:-1]
    return layers, tb_optax.layer_analysis(layers, min_eigenvalues=4)


def test_a_scanned_model_trains_as_the_unrolled_one():
    """On a loss that uses every parameter."""
    trained = []
    for forward, params in (
        (scanned, with_ends(stack(blocks()))),
        (unrolled, with_ends(blocks())),
    ):
        layers, analyze = analysis_of(forward, params)
        sgd = optax.sgd(0.05, momentum=0.9)
        transform = tb_optax.temp_balance(sgd, analyze, interval=2)
        state, step = transform.init(params), table.make_step(transform)
        for _ in range(4):
            params, state = step(params, state)
        trained.append((layers, params, tb_optax.get_state(state)))
    (layers, params, state), (_, others, other_state) = trained
    assert [layer.name for layer in layers] == [
        f"blocks/{name}[{i}]" for i in range(DEPTH) for name in ("first", "second")
    ]
    assert len(set(state.multipliers.tolist())) == 2 * DEPTH
    table.assert_close(state, other_state)
    table.assert_close(params, {**others, "blocks": stack(others["blocks"])})


@pytest.mark.parametrize(("norms", "shape"), [("after", (DEPTH, 1)), ("none", ())])
def test_norms_that_follow_nothing_keep_one_multiplier(norms, shape):
    params = with_ends(stack(blocks()))
    _, analyze = analysis_of(scanned, params, norms)
    found = jax.eval_shape(lambda p: analyze(p).leaf_multipliers(p), params)["blocks"]
    assert found["first"].shape == (DEPTH, 1, 1)
    assert found["bias"].shape == (DEPTH, 1)
    assert found["norm"][0].shape == shape


def test_every_slice_has_a_row_in_the_description():
    params = with_ends(stack(blocks()))
    layers = tb_optax.trace_layers(scanned, params, X)
    rows = {row["leaf"]: row for row in tb_optax.describe(params, layers)}
    first = "blocks/first[0], blocks/first[1], blocks/first[2]"
    for name in ("first", "bias", "norm/0"):
        assert rows[f"blocks/{name}"]["layer"] == first
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
