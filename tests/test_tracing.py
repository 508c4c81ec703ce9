"""What `trace_layers` refuses, its messages and its options."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from notation import array, arrays, axes, layers

from tb_optax import trace_layers
from tb_optax.trace import walk

X = array(5, 8)

# The parameters, the program, and the message.
COMPUTED = "'w' of shape .*is computed with before it enters a product"
UNCLEAR = {
    "computed from two: w 8x2, v 2x6": (lambda p, x: x @ (p["w"] @ p["v"]), COMPUTED),
    "beside its transpose: w 8x8": (lambda p, x: x @ (p["w"] + p["w"].T), COMPUTED),
    "a sum of slices: w 2x8x6": (lambda p, x: x @ (p["w"][0] + p["w"][1]), COMPUTED),
    "blocks of a diagonal: w 8x6": (
        lambda p, x: jnp.einsum(
            "tgd,gdf->tgf", x.reshape(5, 2, 4), p["w"].reshape(2, 4, 6)
        ),
        "'w' of shape .*axis 0 is partly reduction and partly stacked",
    ),
    "never used: w v 8x6": (
        lambda p, x: x @ p["v"],
        "'w' of shape .*forward pass does not use it",
    ),
    "a Fourier transform: w 5x8": (
        lambda p, x: jnp.fft.ifft(jnp.fft.fft(x) * jnp.fft.fft(p["w"])).real,
        "'w' of shape .*enters 'fft', a primitive",
    ),
    "a call into another language: w 8x6": (
        lambda p, x: jax.pure_callback(lambda a, b: a @ b, array(5, 6), x, p["w"]),
        "'w' of shape .*enters 'pure_callback', a primitive",
    ),
    "a product by hand: w 8x6": (
        lambda p, x: (x[:, :, None] * p["w"][None]).sum(1),
        r"'w' of shape .*a matrix product written with `\*`",
    ),
    "a mask of data: w 8x6": (
        lambda p, x: x @ (p["w"] * jnp.exp(x.T @ x[:, :6])),
        "'w' of shape .*then enters a product of data with data",
    ),
    "an ensemble on one input: w 3x8x6": (
        lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]),
        r"'w' of shape .*output axes \(0, 2\) are apart",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_unclear_raises_and_says_what_to_give(name):
    """Or it is left out with one warning, and axes settle everything."""
    params, (forward, message) = arrays(name.partition(": ")[2]), UNCLEAR[name]
    trace = functools.partial(trace_layers, forward, params, X)
    with pytest.raises(ValueError, match=message) as error:
        trace()
    assert "Pass axes={'" in str(error.value)
    assert "or None for a leaf that is no kernel" in str(error.value)
    with pytest.warns(UserWarning, match=message) as warnings:
        found = trace(strict=False)
    assert len(warnings) == 1
    listed = set(re.findall(r"^  '(\w)' of", str(warnings[0].message), re.MULTILINE))
    assert {layer.path for layer in found} == params.keys() - listed
    assert trace(axes={"*": None}) == ()
    if not name.startswith("never used"):
        # Given axes stand wherever the leaf meets data.
        given = {k: axes("sio"[-len(v.shape) :]) for k, v in params.items()}
        found = trace(axes=given)
        assert {layer.path: layer.axes for layer in found} == given


def test_heads_before_inputs_are_unclear_and_axes_settle_them():
    """Experts look the same: `einsum("td,edf->tef", ...)`."""

    def attention(p, x):
        q, k, v = (jnp.einsum("td,hdk->thk", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
        return jnp.einsum("hts,shk,hkd->td", weights, v, p["o"])

    params = arrays("q k v 2x8x4, o 2x4x8")
    message = r"'q' of shape \(2, 8, 4\): its output axes \(0, 2\) are apart"
    with pytest.raises(ValueError, match=message):
        trace_layers(attention, params, X)
    found = trace_layers(attention, params, X, axes={"[qkv]": axes("oio")})
    assert found == layers("q:oio k:oio v:oio o:iio")


def test_bad_options():
    def forward(params, x):
        return x @ params["w"]

    trace = functools.partial(trace_layers, forward, arrays("w 8x6"), X)
    with pytest.raises(ValueError, match="'after', 'before', 'none', got norms = 'by"):
        trace(norms="by name")
    with pytest.raises(ValueError, match="axes: no leaf matches 'v'; the paths"):
        trace(axes={"v": None})
    with pytest.raises(ValueError, match=r"rank 3, 'w' has shape \(8, 6\)"):
        trace(axes={"w": axes("sio")})
    with pytest.raises(ValueError, match="split: no leaf matches 'v'"):
        trace(split={"v": (1, 2)})
    with pytest.raises(ValueError, match=r"'w' has the output axes \(1,\), got axis 0"):
        trace(split={"w": (0, 2)})
    for parts in (4, 0, (2, 3), (6, 0)):
        with pytest.raises(ValueError, match="'w' has 6 outputs, which do not"):
            trace(split={"w": (1, parts)})
    with pytest.raises(ValueError, match=r"axes: .*multiplies no data with 'v'"):
        trace_layers(forward, arrays("w v 8x6"), X, axes={"v": axes("io")})


def test_fused_kernels_fall_into_parts():
    def forward(params, x):
        q, k, v = jnp.split(x @ params["qkv"] + params["bias"], [6, 9], axis=-1)
        return (q * 2) @ params["out"] + k.sum() + v.sum()

    trace = functools.partial(
        trace_layers, forward, arrays("qkv 8x12, bias 12, out 6x8"), X
    )
    assert trace() == layers("qkv<bias out")
    parts = "qkv{0:6}<bias qkv{6:9}<bias qkv{9:12}<bias out"
    assert trace(split={"qkv": (1, (6, 3, 3))}) == layers(parts)
    halves = "qkv{0:6}<bias qkv{6:12}<bias out"
    assert trace(split={"qkv": (1, 2)}) == layers(halves)


def test_static_leaves_and_no_work():
    """Functions among the parameters, numbers among the inputs; nothing is computed."""

    def forward(params, x, options):
        x = params["activation"](x @ params["w"] * options["scale"])
        return x if options["flat"] else x @ params["v"]

    params = {"activation": jnp.tanh, "count": jnp.int32(3), "w": array(8, 6)}
    options = {"flat": True, "scale": 2.0}
    assert trace_layers(forward, params, X, options) == layers("w")
    huge = {"w": array(1 << 20, 1 << 20)}
    found = trace_layers(lambda p, x: x @ p["w"], huge, array(1, 1 << 20))
    assert found == layers("w")


def test_an_axis_name_that_nobody_binds_is_explained():
    """As `BatchNorm(axis_name="batch")` needs one, outside `vmap` or `pmap`."""

    def forward(p, x):
        x = x @ p["w"]
        return x - lax.pmean(x.mean(0), "batch")

    params, x = arrays("w 8x6"), array(2, 5, 8)
    with pytest.raises((NameError, ValueError)) as error:
        trace_layers(forward, params, x)
    text = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert "batch" in text
    assert "axis_name" in text

    def bound(p, x):
        return jax.vmap(forward, (None, 0), axis_name="batch")(p, x)

    assert trace_layers(bound, params, x) == layers("w")


def test_a_parameter_that_jax_has_renamed_is_named_with_its_primitive():
    """Fails where a new JAX names a loop's parameters differently."""
    x = jnp.ones(3)
    scan = jax.make_jaxpr(lambda x: lax.scan(lambda c, x: (c + x, x), 0.0, x))(x)
    loop = jax.make_jaxpr(
        lambda x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, x)
    )(x)
    branch = jax.make_jaxpr(lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x))(x)
    read = {
        "scan": (scan, ("length", "reverse", "jaxpr")),
        "while": (loop, ("cond_nconsts", "body_nconsts", "body_jaxpr")),
        "cond": (branch, ("branches",)),
    }
    for name, (program, fields) in read.items():
        (equation,) = [e for e in program.eqns if e.primitive.name == name]
        for field in fields:
            assert walk.Fields(name, equation.params)[field] is not None
    equation = read["scan"][0].eqns[-1]
    split = walk.scanned(walk.Fields("scan", equation.params), [1, 2])
    assert split == ([], [1], [2])
    params = dict(equation.params)
    for name in ("num_carry", "ft_in"):
        params.pop(name, None)
    with pytest.raises(NotImplementedError, match=r"'num_c\w+' of .* 'scan'"):
        walk.scanned(walk.Fields("scan", params), [1, 2])
