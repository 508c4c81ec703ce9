"""`trace_layers` on programs of a few lines: what it sees, and when it refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tb_optax import Layer, MatrixAxes, trace_layers
from tb_optax.trace import walk

DENSE = MatrixAxes((0,), (1,))
TRANSPOSED = MatrixAxes((1,), (0,))
STACK = MatrixAxes((1,), (2,), stacked=(0,))
HWIO = MatrixAxes((2,), (3,), pooled=(0, 1))


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def arrays(**shapes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: array(*shape) for name, shape in shapes.items()}


X = array(5, 8)


def axes_of(fn, *inputs, shape):
    """Axes of the one kernel of a program, `fn(kernel, *inputs)`."""
    (layer,) = trace_layers(fn, {"w": array(*shape)}, *inputs)
    assert layer.path == "w"
    return layer.axes


def on_kernel(fn):
    return lambda params, *inputs: fn(params["w"], *inputs)


REARRANGED = {
    "plain": (lambda w, x: x @ w, (8, 6), DENSE),
    "left": (lambda w, x: w @ x.T, (6, 8), TRANSPOSED),
    "transposed": (lambda w, x: x @ w.T, (6, 8), TRANSPOSED),
    "split outputs": (lambda w, x: x @ w.reshape(8, 6), (8, 2, 3), ((0,), (1, 2))),
    "split inputs": (lambda w, x: x @ w.reshape(8, 6), (2, 4, 6), ((0, 1), (2,))),
    "joined": (
        lambda w, x: jnp.einsum("td,dhk->thk", x, w.reshape(8, 2, 3)),
        (8, 6),
        DENSE,
    ),
    "split and moved": (
        lambda w, x: x @ w.reshape(2, 3, 8).transpose(2, 1, 0).reshape(8, 6),
        (6, 8),
        TRANSPOSED,
    ),
    "reordering reshape": (
        lambda w, x: x @ lax.reshape(w, (8, 6), dimensions=(1, 0)),
        (6, 8),
        TRANSPOSED,
    ),
    "squeezed": (lambda w, x: x @ w[0, 0], (1, 1, 8, 6), ((0, 1, 2), (3,))),
    "broadcast": (
        lambda w, x: jnp.einsum("td,tdf->tf", x, jnp.broadcast_to(w, (5, 8, 6))),
        (8, 6),
        DENSE,
    ),
    "part of the outputs": (lambda w, x: x @ w[:, 2:4], (8, 6), DENSE),
    "every other": (lambda w, x: x @ w[:, ::2], (8, 6), DENSE),
    "reversed": (lambda w, x: x @ w[::-1], (8, 6), DENSE),
    "cast": (lambda w, x: x.astype("bfloat16") @ w.astype("bfloat16"), (8, 6), DENSE),
    "masked": (lambda w, x: x @ jnp.where(jnp.tri(8, 6) > 0, w, 0), (8, 6), DENSE),
    "quantized": (
        lambda w, x: x @ (jnp.round(w * 7 / abs(w).max()) * abs(w).max() / 7),
        (8, 6),
        DENSE,
    ),
    "standardized": (
        lambda w, x: x @ ((w - w.mean(0)) / jnp.std(w, 0)),
        (8, 6),
        DENSE,
    ),
    "padded": (lambda w, x: x @ jnp.pad(w, ((0, 2), (0, 0))), (6, 6), DENSE),
    "batched": (
        lambda w, x: jnp.einsum("td,tdf->tf", x, w),
        (5, 8, 6),
        ((1,), (2,), (), (0,)),
    ),
    "chosen by data": (
        lambda w, x: jnp.einsum("td,tdf->tf", x, w[jnp.argmax(x, -1)]),
        (8, 8, 6),
        ((1,), (2,), (), (0,)),
    ),
    "remat": (lambda w, x: jax.checkpoint(jnp.matmul)(x, w), (8, 6), DENSE),
    "jit": (lambda w, x: jax.jit(jnp.matmul)(x, w), (8, 6), DENSE),
    "branches": (
        lambda w, x: lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: 2 * x @ w, x),
        (8, 6),
        DENSE,
    ),
    "while": (
        lambda w, x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x),
        (8, 8),
        DENSE,
    ),
    "vmap": (lambda w, x: jax.vmap(lambda x: w @ x)(x), (6, 8), TRANSPOSED),
    "one output": (lambda w, x: x @ w[:, 0], (8, 1), DENSE),
}


@pytest.mark.parametrize("name", REARRANGED)
def test_axes_are_followed(name):
    fn, shape, axes = REARRANGED[name]
    assert axes_of(on_kernel(fn), X, shape=shape) == MatrixAxes(*axes_fields(axes))


def axes_fields(axes):
    if isinstance(axes, MatrixAxes):
        return axes.reduction, axes.output, axes.pooled, axes.stacked
    return axes


CONVOLUTIONS = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), (3, 3, 8, 6), 1, HWIO),
    "NCHW": (
        ("NCHW", "OIHW", "NCHW"),
        (6, 8, 3, 3),
        1,
        MatrixAxes((1,), (0,), pooled=(2, 3)),
    ),
    "odd": (
        ("NHWC", "HOIW", "NHWC"),
        (3, 6, 8, 3),
        1,
        MatrixAxes((2,), (1,), pooled=(0, 3)),
    ),
    "grouped": (("NHWC", "HWIO", "NHWC"), (3, 3, 4, 6), 2, HWIO),
    "depthwise": (("NHWC", "HWIO", "NHWC"), (3, 3, 1, 8), 8, HWIO),
    "one position": (("NHWC", "HWIO", "NHWC"), (1, 1, 8, 6), 1, HWIO),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_any_layout(name):
    layout, shape, groups, axes = CONVOLUTIONS[name]
    images = array(2, 8, 7, 7) if layout[0] == "NCHW" else array(2, 7, 7, 8)

    def forward(w, x):
        return lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    assert axes_of(on_kernel(forward), images, shape=shape) == axes


def test_transposed_convolution():
    def forward(w, x):
        return lax.conv_transpose(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    images = array(2, 7, 7, 8)
    assert axes_of(on_kernel(forward), images, shape=(3, 3, 8, 6)) == HWIO


def test_vmapped_convolutions_are_a_stack():
    """Both layers of an ensemble on one input, though vmap folds the first into one."""

    def forward(params, x):
        def member(params, x):
            for name in ("a", "b"):
                x = lax.conv_general_dilated(
                    x,
                    params[name],
                    (1, 1),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            return x

        return jax.vmap(member, (0, None))(params, x)

    params = arrays(a=(4, 3, 3, 8, 6), b=(4, 3, 3, 6, 2))
    axes = MatrixAxes((3,), (4,), pooled=(1, 2), stacked=(0,))
    found = trace_layers(forward, params, array(2, 7, 7, 8))
    assert found == (Layer("a", axes), Layer("b", axes))


def scanned(params, x, **options):
    def body(x, slices):
        return jnp.tanh(x @ slices["w"] + slices["b"]) @ slices["v"], None

    return lax.scan(body, x, params, **options)[0]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_loop_runs_slice_by_slice(reverse):
    params = arrays(w=(3, 8, 6), b=(3, 6), v=(3, 6, 8))
    expected = []
    for i in reversed(range(3)) if reverse else range(3):
        expected.append(Layer("w", STACK, ("b",), index=(i,)))
        expected.append(Layer("v", STACK, index=(i,)))
    found = trace_layers(functools.partial(scanned, reverse=reverse), params, X)
    assert found == tuple(expected)


def test_a_loop_of_loops():
    def forward(params, x):
        return lax.scan(lambda x, w: (scanned(w, x), None), x, params)[0]

    params = arrays(w=(2, 3, 8, 6), b=(2, 3, 6), v=(2, 3, 6, 8))
    axes = MatrixAxes((2,), (3,), stacked=(0, 1))
    found = trace_layers(forward, params, X)
    indices = [(i, j) for i in range(2) for j in range(3)]
    assert [layer.index for layer in found] == [i for i in indices for _ in "wv"]
    assert found[0] == Layer("w", axes, ("b",), index=(0, 0))


def test_loops_over_stacks_that_were_rearranged():
    """Two axes joined run one after the other; reversed, from the end."""

    def indices(rearrange):
        def forward(params, x):
            return lax.scan(lambda x, w: (x @ w, None), x, rearrange(params["w"]))[0]

        found = trace_layers(forward, arrays(w=(2, 3, 8, 8)), X)
        return [layer.index for layer in found]

    joined = [(i, j) for i in range(2) for j in range(3)]
    assert indices(lambda w: w.reshape(6, 8, 8)) == joined
    assert indices(lambda w: w.reshape(6, 8, 8)[::-1]) == joined[::-1]
    assert indices(lambda w: w[1, ::2]) == [(1, 0), (1, 2)]


def test_slices_that_are_named_one_by_one():
    def forward(params, x):
        return x @ params["w"][2] @ params["w"][0]

    found = trace_layers(forward, arrays(w=(3, 8, 8)), X)
    assert found == tuple(Layer("w", STACK, index=(i,)) for i in (2, 0))


def test_a_slice_by_a_computed_number_leaves_the_stack_whole():
    def forward(params, x):
        return lax.fori_loop(0, 3, lambda i, x: x @ params["w"][i], x)

    found = trace_layers(forward, arrays(w=(3, 8, 8)), X)
    assert found == (Layer("w", STACK),)


def test_a_stack_of_experts_in_a_loop():
    """Slice after slice of the loop, in each the experts."""

    def forward(params, x):
        def body(x, w):
            return jnp.einsum("etd,edf->etf", x, w), None

        return lax.scan(body, x, params["w"])[0]

    found = trace_layers(forward, arrays(w=(2, 3, 8, 8)), array(3, 5, 8))
    axes = MatrixAxes((2,), (3,), stacked=(0, 1))
    indices = [(i, j) for i in range(2) for j in range(3)]
    assert found == tuple(Layer("w", axes, index=index) for index in indices)


def test_a_recurrent_kernel_is_one_layer_though_its_state_starts_constant():
    def forward(params, x):
        def body(h, x):
            return jnp.tanh(x @ params["i"] + h @ params["h"] + params["b"]), None

        return lax.scan(body, jnp.zeros((5, 6)), x)[0]

    found = trace_layers(forward, arrays(i=(8, 6), h=(6, 6), b=(6,)), array(7, 5, 8))
    assert found == (Layer("i", DENSE), Layer("h", DENSE, ("b",)))


def layer_norm(x, scale, offset):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True)) * scale + offset


def test_a_shared_norm_follows_no_layer():
    def forward(params, x):
        for name in ("a", "b"):
            x = layer_norm(x @ params[name], params["scale"], params["offset"])
        return x

    params = arrays(a=(8, 8), b=(8, 8), scale=(8,), offset=(8,))
    for norms in ("after", "before", "none"):
        found = trace_layers(forward, params, X, norms=norms)
        assert found == (Layer("a", DENSE), Layer("b", DENSE))


def test_norms_of_one_layer():
    def forward(params, x):
        x = x @ params["a"] + params["bias"]
        x = jax.nn.relu(layer_norm(x, params["scale"], params["offset"]))
        return x @ params["b"]

    params = arrays(a=(8, 8), b=(8, 8), bias=(8,), scale=(8,), offset=(8,))
    norms = ("offset", "scale")
    trace = functools.partial(trace_layers, forward, params, X)
    b = Layer("b", DENSE)
    assert trace() == (Layer("a", DENSE, ("bias", *norms)), b)
    assert trace(norms="none") == (Layer("a", DENSE, ("bias",)), b)
    assert trace(norms="before") == (
        Layer("a", DENSE, ("bias",)),
        Layer("b", DENSE, norms),
    )


def test_a_norm_before_the_first_layer():
    def forward(params, x):
        return layer_norm(x, params["scale"], params["offset"]) @ params["a"]

    params = arrays(a=(8, 8), scale=(8,), offset=(8,))
    assert trace_layers(forward, params, X) == (Layer("a", DENSE),)
    found = trace_layers(forward, params, X, norms="before")
    assert found == (Layer("a", DENSE, ("offset", "scale")),)


def attention_by_heads(params, x):
    q, k, v = (jnp.einsum("td,hdk->thk", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
    return jnp.einsum("hts,shk,hkd->td", weights, v, params["o"])


HEADS = arrays(q=(2, 8, 4), k=(2, 8, 4), v=(2, 8, 4), o=(2, 4, 8))


def test_heads_before_inputs_are_unclear_and_axes_settle_them():
    """Experts look the same: `einsum("td,edf->tef", ...)`."""
    message = r"'q' of shape \(2, 8, 4\): its output axes \(0, 2\) are apart"
    with pytest.raises(ValueError, match=message):
        trace_layers(attention_by_heads, HEADS, X)
    axes = MatrixAxes((1,), (0, 2))
    found = trace_layers(attention_by_heads, HEADS, X, axes={"[qkv]": axes})
    assert [layer.path for layer in found] == ["q", "k", "v", "o"]
    assert {layer.axes for layer in found[:3]} == {axes}
    assert found[3].axes == MatrixAxes((0, 1), (2,))


def multiplied_out(params, x):
    return (x[:, :, None] * params["w"][None]).sum(1)


UNCLEAR = {
    "computed from two": (
        lambda p, x: x @ (p["w"] @ p["v"]),
        {"w": (8, 2), "v": (2, 6)},
        "'w' of shape .*is computed with before it enters a product",
    ),
    "beside its transpose": (
        lambda p, x: x @ (p["w"] + p["w"].T),
        {"w": (8, 8)},
        "'w' of shape .*is computed with before it enters a product",
    ),
    "a sum of slices": (
        lambda p, x: x @ (p["w"][0] + p["w"][1]),
        {"w": (2, 8, 6)},
        "'w' of shape .*is computed with before it enters a product",
    ),
    "blocks of a diagonal": (
        lambda p, x: jnp.einsum(
            "tgd,gdf->tgf", x.reshape(5, 2, 4), p["w"].reshape(2, 4, 6)
        ),
        {"w": (8, 6)},
        "'w' of shape .*axis 0 is partly reduction and partly stacked",
    ),
    "never used": (
        lambda p, x: x @ p["v"],
        {"w": (8, 6), "v": (8, 6)},
        "'w' of shape .*forward pass does not use it",
    ),
    "a Fourier transform": (
        lambda p, x: jnp.fft.ifft(jnp.fft.fft(x) * jnp.fft.fft(p["w"])).real,
        {"w": (5, 8)},
        "'w' of shape .*enters 'fft', a primitive",
    ),
    "a call into another language": (
        lambda p, x: jax.pure_callback(lambda a, b: a @ b, array(5, 6), x, p["w"]),
        {"w": (8, 6)},
        "'w' of shape .*enters 'pure_callback', a primitive",
    ),
    "a product by hand": (
        multiplied_out,
        {"w": (8, 6)},
        r"'w' of shape .*a matrix product written with `\*`",
    ),
    "a mask of data": (
        lambda p, x: x @ (p["w"] * jnp.exp(x.T @ x[:, :6])),
        {"w": (8, 6)},
        "'w' of shape .*then enters a product of data with data",
    ),
    "an ensemble on one input": (
        lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]),
        {"w": (3, 8, 6)},
        r"'w' of shape .*output axes \(0, 2\) are apart",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_unclear_raises_and_says_what_to_give(name):
    forward, shapes, message = UNCLEAR[name]
    params = arrays(**shapes)
    with pytest.raises(ValueError, match=message) as error:
        trace_layers(forward, params, X)
    assert "Pass axes={'" in str(error.value)
    assert "or None for a leaf that is no kernel" in str(error.value)


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_unclear_is_left_out_with_one_warning(name):
    forward, shapes, message = UNCLEAR[name]
    with pytest.warns(UserWarning, match=message) as warnings:
        found = trace_layers(forward, arrays(**shapes), X, strict=False)
    assert len(warnings) == 1
    listed = set(re.findall(r"^  '(\w)' of", str(warnings[0].message), re.MULTILINE))
    assert {layer.path for layer in found} == shapes.keys() - listed


@pytest.mark.parametrize("name", UNCLEAR)
def test_axes_settle_everything(name):
    """None leaves out; given axes stand wherever the leaf meets data."""
    forward, shapes, _ = UNCLEAR[name]
    params = arrays(**shapes)
    assert trace_layers(forward, params, X, axes={"*": None}) == ()
    if name == "never used":
        return
    axes = {k: STACK if len(v) == 3 else DENSE for k, v in shapes.items()}
    found = trace_layers(forward, params, X, axes=axes)
    assert {layer.path: layer.axes for layer in found} == axes


def test_transposed_uses_have_one_spectrum_and_make_one_layer():
    """The first use names the outputs."""
    params = arrays(w=(8, 6), v=(6, 3))
    found = trace_layers(lambda p, x: x @ p["w"] @ p["w"].T, arrays(w=(8, 6)), X)
    assert found == (Layer("w", DENSE),)

    def gradient(params, x):
        def loss(params):
            return jnp.sum((jnp.tanh(x @ params["w"]) @ params["v"]) ** 2)

        return jax.grad(loss)(params)

    found = trace_layers(gradient, params, X)
    assert found == (Layer("w", DENSE), Layer("v", DENSE))


def test_bad_options():
    params = arrays(w=(8, 6))

    def forward(params, x):
        return x @ params["w"]

    trace = functools.partial(trace_layers, forward, params, X)
    with pytest.raises(ValueError, match="'after', 'before', 'none', got norms = 'by"):
        trace(norms="by name")
    with pytest.raises(ValueError, match="axes: no leaf matches 'v'; the paths"):
        trace(axes={"v": None})
    with pytest.raises(ValueError, match=r"rank 3, 'w' has shape \(8, 6\)"):
        trace(axes={"w": STACK})
    with pytest.raises(ValueError, match="split: no leaf matches 'v'"):
        trace(split={"v": (1, 2)})
    with pytest.raises(ValueError, match=r"'w' has the output axes \(1,\), got axis 0"):
        trace(split={"w": (0, 2)})
    for parts in (4, 0, (2, 3), (6, 0)):
        with pytest.raises(ValueError, match="'w' has 6 outputs, which do not"):
            trace(split={"w": (1, parts)})
    with pytest.raises(ValueError, match=r"axes: .*multiplies no data with 'v'"):
        trace_layers(forward, params | arrays(v=(8, 6)), X, axes={"v": DENSE})


def test_fused_kernels_fall_into_parts():
    def forward(params, x):
        q, k, v = jnp.split(x @ params["qkv"] + params["bias"], [6, 9], axis=-1)
        return (q * 2) @ params["out"] + k.sum() + v.sum()

    params = arrays(qkv=(8, 12), bias=(12,), out=(6, 8))
    fused = Layer("qkv", DENSE, ("bias",))
    parts = [(0, 6), (6, 9), (9, 12)]
    assert trace_layers(forward, params, X)[0] == fused
    found = trace_layers(forward, params, X, split={"qkv": (1, (6, 3, 3))})
    assert found[:-1] == tuple(
        Layer("qkv", DENSE, ("bias",), part=(1, *part)) for part in parts
    )
    found = trace_layers(forward, params, X, split={"qkv": (1, 2)})
    assert [layer.part for layer in found[:-1]] == [(1, 0, 6), (1, 6, 12)]


def test_static_leaves_and_no_work():
    """Functions among the parameters, numbers among the inputs; nothing is computed."""

    def forward(params, x, options):
        x = params["activation"](x @ params["w"] * options["scale"])
        return x if options["flat"] else x @ params["v"]

    params = {"activation": jnp.tanh, "count": jnp.int32(3), **arrays(w=(8, 6))}
    options = {"flat": True, "scale": 2.0}
    assert trace_layers(forward, params, X, options) == (Layer("w", DENSE),)
    huge = {"w": array(1 << 20, 1 << 20)}
    x = array(1, 1 << 20)
    found = trace_layers(lambda p, x: x @ p["w"], huge, x)
    assert found == (Layer("w", DENSE),)


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
    operands = [1, 2]
    assert walk.scanned(walk.Fields("scan", equation.params), operands) == (
        [],
        [1],
        [2],
    )
    params = dict(equation.params)
    for name in ("num_carry", "ft_in"):
        params.pop(name, None)
    with pytest.raises(NotImplementedError, match=r"'num_c\w+' of .* 'scan'"):
        walk.scanned(walk.Fields("scan", params), operands)
