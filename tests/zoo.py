"""Small models of the kinds that `trace_layers` must read rightly.

Each is a few lines of plain JAX in the manner of a published one, `forward(inputs,
**params)`, and states in the notation of `notation.py` what must be found in it: the
layers in order of execution, and after `|` the leaves that are neither layers nor
followers.  The expectations follow from what the program computes.  Where two answers
are defensible a comment says why, and an error that names the leaf is accepted in place
of the list.
"""

import dataclasses
import fnmatch
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from notation import array, arrays, axes, each, in_any_order, layers

from tb_optax import Layer, MatrixAxes
from tb_optax.leaves import leaves_of


@dataclasses.dataclass(frozen=True)
class Case:
    """A program and what must be found in it.

    Attributes:
        forward: the program, a function of the parameters and the inputs.
        params: its parameters, abstract.
        inputs: its inputs, abstract.
        options: of `trace_layers`.
        layers: what must be found; None where an error is the only right answer.
        free: vectors that may follow a layer or none, for which no rule is written.
        named: leaves that an error must name, the first of them first.  With `layers`
            as well, either answer is right.
        says: what the error must contain.
    """

    forward: Callable[..., Any]
    params: Any
    inputs: Sequence[Any]
    options: Mapping[str, Any]
    layers: tuple[Layer, ...] | None
    free: frozenset[str]
    named: tuple[str, ...]
    says: str


CASES: dict[str, Case] = {}
X = array(2, 5, 8)
ROWS = array(5, 8)
IMAGE = array(2, 8, 8, 3)
TOKENS = array(2, 5, dtype=jnp.int32)


def case(
    params: Any,
    verdict: str,
    inputs: Sequence[Any] = (X,),
    *,
    name: str = "",
    free: str = "",
    named: str = "",
    says: str = "",
    given: Sequence[Mapping[str, str | None]] = (),
    before: str = "",
    **options: Any,
):
    """Enter a program into the table; several of them may stand over one function.

    Each of `given` enters it again with these axes, which settle it: the same layers
    but for what is None.  `before` enters it with its layers for norms="before".  An
    empty verdict stands for an error.
    """
    params = arrays(params)
    leaves = leaves_of(params)
    own, _, none = verdict.partition("|")
    found = layers(own) if verdict else None
    for path in named.split():
        assert sum(size > 1 for size in leaves[path].shape) > 1, "needs no reading"
    assert found is not None or named
    if found is not None:
        # The table itself is complete: it leaves nothing unsaid.
        placed = {path for one in found for path in (one.path, *one.follows)}
        assert leaves.keys() == {*placed, *none.split(), *free.split()}

    def enter_all(program: Callable[..., Any]) -> Callable[..., Any]:
        def enter(found: Any, named: str = "", **options: Any) -> None:
            own = name or program.__name__
            for option, value in options.items():
                own += (
                    f" {option}={sorted(value) if isinstance(value, dict) else value}"
                )
            assert own not in CASES, own
            CASES[own] = Case(
                lambda params, *inputs: program(*inputs, **params),
                *(params, inputs, options, found, frozenset(free.split())),
                *(tuple(named.split()), says),
            )

        enter(found, named, **options)
        for texts in given:
            read = {
                key: None if text is None else axes(text) for key, text in texts.items()
            }
            out = {path for path in leaves if _matches(read, path)}
            kept = [
                dataclasses.replace(one, follows=tuple(set(one.follows) - out))
                for one in found or ()
                if one.path not in out
            ]
            enter(in_any_order(kept), axes=read, **options)
        if before:
            enter(layers(before), **options, norms="before")
        return program

    return enter_all


def _matches(patterns: Mapping[str, MatrixAxes | None], path: str) -> bool:
    """Say whether the first pattern that matches a path leaves it out."""
    found = [v for p, v in patterns.items() if fnmatch.fnmatchcase(path, p)]
    return bool(found) and found[0] is None


# ---- Building blocks -----------------------------------------------------------------


def heads(x, count: int = 2):
    return x.reshape(*x.shape[:-1], count, -1)


def joined(x):
    return x.reshape(*x.shape[:-2], -1)


def attend(q, k, v, bias: Any = 0.0):
    """Attention of (batch, time, heads, dim)."""
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
    return joined(jnp.einsum("bhqk,bkhd->bqhd", weights, v))


def attention(x, q, k, v, o, bias: Any = 0.0):
    return attend(heads(x @ q), heads(x @ k), heads(x @ v), bias) @ o


def layer_norm(x, scale, offset=0.0, axis: Any = -1):
    x = x - x.mean(axis, keepdims=True)
    return x * lax.rsqrt((x**2).mean(axis, keepdims=True) + 1e-6) * scale + offset


def rms_norm(x, scale):
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def group_norm(x, scale, offset, groups: int = 2):
    y = x.reshape(*x.shape[:-1], groups, -1)
    return layer_norm(y, 1.0, axis=(1, 2, 4)).reshape(x.shape) * scale + offset


def conv(x, kernel, stride: int = 1, groups: int = 1, layout: str = ""):
    """A convolution of channels last, or of a layout such as `"NCHW OIHW NCHW"`."""
    layout = layout or ("NHWC HWIO NHWC" if x.ndim == 4 else "NWC WIO NWC")
    images, kernels, outputs = layout.split()
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * (x.ndim - 2),
        "SAME",
        dimension_numbers=(images, kernels, outputs),
        feature_group_count=groups,
    )


# ---- One kernel, which other functions lead to data ----------------------------------


@jax.custom_jvp
def _clipped(w):
    return jnp.clip(w, -1, 1)


_clipped.defjvp(lambda primals, tangents: (_clipped(*primals), tangents[0]))


@jax.custom_vjp
def _rounded(w):
    return jnp.round(w)


_rounded.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))


def _power_iteration(w):
    s, v = lax.stop_gradient(w), jnp.ones(8)
    for _ in range(2):
        u = v @ s
        v = s @ (u / jnp.linalg.norm(u))
    return w / (lax.stop_gradient(v) @ w @ lax.stop_gradient(u))


def _printed(w):
    jax.debug.print("norm {}", jnp.linalg.norm(w))
    jax.debug.callback(print, w)
    return w


# The program is `x @ f(w) + b`.  Identities, views, and what is computed from a kernel
# alone do not make it unclear.  Shape and axes, if not 8x6 and io, are in the name.
ONE_KERNEL: dict[str, Callable[[Any], Any]] = {
    "plain": lambda w: w,
    "transposed: 6x8 oi": lambda w: w.T,
    "split outputs: 8x2x3 ioo": lambda w: w.reshape(8, 6),
    "split inputs: 2x4x6 iio": lambda w: w.reshape(8, 6),
    "split and moved: 6x8 oi": lambda w: (
        w.reshape(2, 3, 8).transpose(2, 1, 0).reshape(8, 6)
    ),
    "reordered by a reshape: 6x8 oi": lambda w: lax.reshape(w, (8, 6), (1, 0)),
    "squeezed: 1x1x8x6 iiio": lambda w: w[0, 0],
    "part of the outputs": lambda w: w[:, 2:4],
    "every other output": lambda w: w[:, ::2],
    "reversed": lambda w: w[::-1],
    "padded: 6x6 io": lambda w: jnp.pad(w, ((0, 2), (0, 0))),
    "masked": lambda w: jnp.where(jnp.tri(8, 6) > 0, w, 0),
    "quantized": lambda w: jnp.round(w * 7 / abs(w).max()) * abs(w).max() / 7,
    "standardized": lambda w: (w - w.mean(0)) / jnp.std(w, 0),
    "frozen": lax.stop_gradient,
    "straight through": lambda w: w + lax.stop_gradient(jnp.round(w * 8) / 8 - w),
    "spectral norm": _power_iteration,
    "bounded norm": lambda w: w * jnp.minimum(1, 3 / jnp.linalg.norm(w, axis=0)),
    "printed": _printed,
    "reduced precision": lambda w: lax.reduce_precision(w, 8, 7),
    "own tangent": _clipped,
    "own cotangent": _rounded,
    "named": lambda w: checkpoint_name(w, "w"),
}


def _enter_kernel(name: str, compute: Callable[[Any], Any]) -> None:
    name, _, read = name.partition(": ")
    sizes, letters = read.split() if read else ("8x6", "io")
    outputs = jax.eval_shape(compute, arrays(sizes)).shape[1]
    enter = case(f"w {sizes}, b {outputs}", f"w:{letters}<b", name=name)
    enter(lambda x, w, b: x @ compute(w) + b)


for _name, _compute in ONE_KERNEL.items():
    _enter_kernel(_name, _compute)


# ---- Programs of one line ------------------------------------------------------------

GRAPH = (np.arange(25).reshape(5, 5) % 3 == 0).astype(np.float32)
FEATURES = np.linspace(-1, 1, 40, dtype=np.float32).reshape(5, 8)
INPUTS = {"image": IMAGE, "maps": array(2, 8, 8, 8), "tokens": TOKENS, "x": ROWS}

# Name, parameters, and verdict, with ! before what an error may name instead; and the
# verdict for norms="before" where it is another.  Arguments that are no parameters are
# inputs.
ONE_LINE: dict[str, Callable[..., Any]] = {
    "on the left: w 6x8 -> w:oi": lambda x, w: w @ x.T,
    "joined from parts: w 8x6 -> w": lambda x, w: jnp.einsum(
        "td,dhk->thk", x, w.reshape(8, 2, 3)
    ),
    "repeated for each row: w 8x6 -> w": lambda x, w: jnp.einsum(
        "td,tdf->tf", x, jnp.broadcast_to(w, (5, 8, 6))
    ),
    "one for each row: w 5x8x6 -> w:sio": lambda x, w: jnp.einsum("td,tdf->tf", x, w),
    "chosen by data: w 8x8x6 -> w:sio": lambda x, w: jnp.einsum(
        "td,tdf->tf", x, w[jnp.argmax(x, -1)]
    ),
    "one output: w 8x1 -> w": lambda x, w: x @ w[:, 0],
    # What is computed from one-hot rows need not be one-hot.
    "one-hot rows added: w 8x6 -> w": lambda x, w: (x + np.eye(5, 8)) @ w,
    "one-hot rows multiplied: w 8x6 -> w": lambda x, w: (x * np.eye(5, 8)) @ w,
    "compared again: w 8x6 -> w": lambda x, w: (
        (jax.nn.one_hot(jnp.argmax(x, -1), 8) == np.arange(5)[:, None]) @ w
    ),
    "cast: w 8x6 -> w": lambda x, w: x.astype("bfloat16") @ w.astype("bfloat16"),
    "remat: w 8x6 -> w": lambda x, w: jax.checkpoint(jnp.matmul)(x, w),
    "jit: w 8x6 -> w": lambda x, w: jax.jit(jnp.matmul)(x, w),
    "vmap: w 6x8 -> w:oi": lambda x, w: jax.vmap(lambda x: w @ x)(x),
    "branches: w 8x6 -> w": lambda x, w: lax.cond(
        x.sum() > 0, lambda x: x @ w, lambda x: 2 * x @ w, x
    ),
    "while: w 8x8 -> w": lambda x, w: lax.while_loop(
        lambda x: x.sum() > 0, lambda x: x @ w, x
    ),
    "a slice by a computed number: w 3x8x8 -> w:sio": lambda x, w: lax.fori_loop(
        0, 3, lambda i, x: x @ w[i], x
    ),
    "slices by name: w 3x8x8 -> w[2]:sio w[0]:sio": lambda x, w: x @ w[2] @ w[0],
    "returned: w 8x6, b 6 -> w<b": lambda x, w, b: (
        x @ w + b,
        jnp.linalg.svd(w, compute_uv=False).max(),
        ((w.T @ w - jnp.eye(6)) ** 2).sum(),
    ),
    # The logarithm of the determinant joins the likelihood of a flow.
    "determinant: w 8x8, b 8 -> w<b": lambda x, w, b: (
        jnp.linalg.slogdet(w)[1] - ((x @ w + b) ** 2).sum(-1) / 2
    ),
    f"as many layers as channels: w 8x8x8, g 8 -> {each(8, 'w[#]:sio')} | g": (
        lambda x, w, g: rms_norm(
            lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], g
        )
    ),
    # A kernel with its transpose has one spectrum: the first use names the outputs.
    "both ways: w 8x6 -> w": lambda x, w: x @ w @ w.T,
    "scores and their mean: memory 6x8 -> memory:oi": lambda x, memory: (
        jax.nn.softmax(x @ memory.T) @ memory
    ),
    # The second bias is added to the output of a product of w too, the transposed one.
    "tied autoencoder: w 8x2, b 2, c 8 -> w<b,c": lambda x, w, b, c: (
        jnp.tanh(x @ w + b) @ w.T + c
    ),
    "tied autoencoder with norms: w 8x6, b g c 6, d s t 8 -> w<b,c,d,g,s,t": (
        lambda x, w, b, g, c, d, s, t: layer_norm(
            jnp.tanh(layer_norm(x @ w + b, g, c)) @ w.T + d, s, t
        )
    ),
    # LoRA: what a kernel is computed from follows it; products of their own do not.
    "added factors: w 8x6, a 8x2, b 2x6 -> w<a,b": lambda x, w, a, b: x @ (w + a @ b),
    "factors beside: w 8x6, c 6, a 8x2, b 2x6 -> w<c a b": lambda x, w, c, a, b: (
        x @ lax.stop_gradient(w) + c + 2.0 * (x @ a @ b)
    ),
    "Fourier features: b 8x16, w 32x3 -> b w": lambda x, b, w: (
        jnp.concatenate([jnp.sin(x @ b), jnp.cos(x @ b)], -1) @ w
    ),
    "fixed features: w 16x3 -> w": lambda x, w: (
        jnp.sin(x @ jax.random.normal(jax.random.key(0), (8, 16))) @ w
    ),
    "experts by rows: v 4x8x6, w 4x6x8 -> v:sio w:sio": lambda x, v, w: lax.ragged_dot(
        jax.nn.silu(lax.ragged_dot(x, v, jnp.asarray([3, 0, 1, 1]))),
        w,
        jnp.asarray([3, 0, 1, 1]),
    ),
    # A constant one-hot vector picks a row: a look-up, no layer.
    "constant label: w 8x8, table 4x8 -> w | table": lambda x, w, table: (
        x @ w + jnp.asarray(np.eye(4, dtype=np.float32)[2]) @ table
    ),
    "resized rows: w 8x8, rows 7x8 -> w | rows": lambda x, w, rows: (
        x @ w + jax.image.resize(rows, (5, 8), "cubic")
    ),
    "constant noise: w 8x6, b 6 -> w<b": lambda x, w, b: (
        x @ (w + jax.random.uniform(jax.random.key(0), (8, 6)) / 256) + b
    ),
    "diagonal added: w 8x8, d b 8 -> w<b,d": lambda x, w, d, b: (
        x @ (w + jnp.diag(d)) + b
    ),
    "a gain where a kernel is positive: w 8x6, g b 6 -> w<b,g": lambda x, w, g, b: (
        x @ jnp.where(w > 0, g * w, w) + b
    ),
    "one map per head, summed over heads: w 8x8, out 2x4x6 -> w out:iio": (
        lambda x, w, out: jnp.einsum("shd,hde->se", heads(x @ w), out)
    ),
    "blocks with a flat bias: w 2x4x3, b 2x3 -> w:sio<b": lambda x, w, b: (
        jnp.einsum("thi,hio->tho", heads(x), w).reshape(5, 6) + b.reshape(-1)
    ),
    "bytes of the data: w 8x6, b 6 -> w<b": lambda x, w, b: (
        lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.float32).mean(-1) @ w + b
    ),
    "rows of a codebook: e 8x16, codebook 16x4x4x3 -> e | codebook": (
        lambda x, e, codebook: codebook[(x @ e).argmax(-1)]
    ),
    # Sums of places are no differences: a Fourier transform of constants is data.
    "cosine features: w 8x8, c 5x8 -> w c": lambda x, w, c: (
        x @ w + jnp.cos(jnp.arange(5.0)[:, None] * jnp.arange(5.0)) @ c
    ),
    "a picture by its coordinates: w 2x16, b 16, v 16x3 -> w<b v": (
        lambda w, b, v: jnp.sin(jnp.stack([jnp.arange(5.0)] * 2, -1) @ w + b) @ v
    ),
    "gradient of the parameters: w 8x6, v 6x3 -> w v": lambda x, **params: jax.grad(
        lambda p: jnp.sum((jnp.tanh(x @ p["w"]) @ p["v"]) ** 2)
    )(params),
    # A kernel that is computed from data is data.
    "hypernetwork of data: h 8x48, hb 48 -> h<hb": lambda x, h, hb: jnp.einsum(
        "td,tdf->tf", x, (x @ h + hb).reshape(5, 8, 6)
    ),
    "norm first: a 8x8, g c 8 -> a | g c -> a<c,g": lambda x, a, g, c: (
        layer_norm(x, g, c) @ a
    ),
    "norm of two axes: w 8x8, g c 5x8, o 8x3 -> w<c,g o -> w o<c,g": (
        lambda x, w, g, c, o: layer_norm(x @ w, g, c, (0, 1)) @ o
    ),
    "norm of the transpose: w 8x8, g c 8x5, o 8x3 -> w<c,g o -> w o<c,g": (
        lambda x, w, g, c, o: layer_norm((x @ w).T, g, c, (0, 1)).T @ o
    ),
    "norm between layers: a b 8x8, bias g c 8 -> a<bias,c,g b -> a<bias b<c,g": (
        lambda x, a, bias, g, c, b: jnp.tanh(layer_norm(x @ a + bias, g, c)) @ b
    ),
    "shared norm: a b 8x8, g c 8 -> a b | g c -> a b": lambda x, a, b, g, c: layer_norm(
        layer_norm(x @ a, g, c) @ b, g, c
    ),
    "transposed convolution: w 3x3x8x6 -> w:ppio": lambda maps, w: lax.conv_transpose(
        maps, w, (2, 2), "SAME"
    ),
    "resized positions: patch 3x8, rows 1x4x4x8 -> patch | rows": (
        lambda image, patch, rows: (
            image @ patch + jax.image.resize(rows, (1, 8, 8, 8), "bilinear")
        )
    ),
    "rows that enter a kernel: table 11x2x4, w 4x6, b 6 -> w<b | table": (
        lambda tokens, table, w, b: table[tokens] @ w + b
    ),
    "one-hot tokens: embed 11x8, w 8x3 -> w | embed": lambda tokens, embed, w: (
        jax.nn.one_hot(tokens, 11) @ embed @ w
    ),
    # Data that is closed over: constants hold no parameter, so they are data.
    "a network on its one graph: w 8x16, v 16x3 -> w v": lambda w, v: (
        GRAPH @ jnp.tanh(GRAPH @ FEATURES @ w) @ v
    ),
    "a generator of noise: g 8x8, c 8, h w 8x8 -> g<c h w": lambda x, g, c, h, w: (
        jnp.tanh(jax.random.normal(jax.random.key(0), (8,)) @ g + c) @ h * (x @ w)
    ),
    "constant coordinates: c 2x16, d 16x8, w 8x8 -> w c d": lambda x, c, d, w: (
        x @ w + jnp.tanh(np.ones((5, 2), np.float32) @ c) @ d
    ),
    # The look-up of a label with the one-hot matrix computed in the program, whose
    # entries are not in sight.  An error is lawful, a layer is not.
    "computed one-hot: table 4x8, w 8x8 -> w | table ! table": lambda x, table, w: (
        x @ w + jax.nn.one_hot(jnp.arange(5) % 4, 4) @ table
    ),
    # Scaled entry by entry: no matrix, and behind no layer.
    "masked inputs: mask 5x8, w 8x6, b 6 -> w<b | mask ! mask": (
        lambda x, mask, w, b: (x * jax.nn.sigmoid(mask)) @ w + b
    ),
    "only returned: w 8x6, b 6, v 8x6 -> ! v": lambda x, w, b, v: (
        x @ w + b,
        (v**2).sum(),
    ),
}
for _text, _forward in ONE_LINE.items():
    _name, _params, _verdict, *_before = re.split(": | -> ", _text)
    _found, _, _named = _verdict.partition("!")
    _inputs = [INPUTS[k] for k in inspect.signature(_forward).parameters if k in INPUTS]
    _options = {"name": _name, "named": _named, "before": "".join(_before)}
    case(_params, _found.strip(), _inputs, **_options)(_forward)


# ---- Convolutions --------------------------------------------------------------------


for _sizes, _axes, _how in (
    ("3x3x8x6", "ppio", {}),
    ("1x1x8x6", "ppio", {}),
    ("3x3x4x6", "ppio", {"groups": 2}),
    ("3x3x1x8", "ppio", {"groups": 8}),
    ("6x8x3x3", "oipp", {"layout": "NCHW OIHW NCHW"}),
    ("3x6x8x3", "poip", {"layout": "NHWC HOIW NHWC"}),
):
    case(
        {"kernel": _sizes},
        f"kernel:{_axes}",
        [array(2, 8, 8, 8)],
        name=f"convolution with a kernel of {_sizes}",
    )(functools.partial(conv, **_how))


# vmap folds the first layer of an ensemble into one with more outputs.
@case("a 3x3x3x3x6, ba 3x6, b 3x3x3x6x4, bb 3x4", "a:sppio<ba b:sppio<bb", [IMAGE])
def ensemble_of_convolutions(x, **members):
    def member(p):
        return conv(jax.nn.relu(conv(x, p["a"]) + p["ba"]), p["b"]) + p["bb"]

    return jax.vmap(member)(members)


# ---- Outputs reshaped into heads or blocks that meet a parameter per head ------------
# A factor of the output axis is batched, not the axis: the kernel remains one layer.


@case("wk 8x8, bk 8, wv 8x8, query 2x4, wo 8x8", "wk<bk wv wo | query")
def attention_pooling(x, wk, bk, wv, query, wo):
    """A learned query per head: without outputs it is no matrix."""
    k, v = heads(x @ wk + bk), heads(x @ wv)
    weights = jax.nn.softmax(jnp.einsum("hd,bshd->bhs", query, k))
    return joined(jnp.einsum("bhs,bshd->bhd", weights, v)) @ wo


@case("w 8x8, a 2x4, o 8x3", "w o | a")
def graph_attention(x, w, a, o):
    h = heads(x @ w)
    scores = jnp.einsum("bshd,hd->bsh", h, a)
    return joined(jnp.einsum("bsh,bshd->bhd", jax.nn.softmax(scores, 1), h)) @ o


@case(
    "w1 8x8, b1 8, u 2x4x6, bu 2x6, v 2x6x4, bv 2x4, w2 8x3",
    "w1<b1 u:sio<bu v:sio<bv w2",
)
def block_diagonal(x, w1, b1, u, bu, v, bv, w2):
    """Two layers of blocks in a row."""
    h = heads(jax.nn.gelu(x @ w1 + b1))
    h = jax.nn.relu(jnp.einsum("bsgd,gde->bsge", h, u) + bu)
    return joined(jnp.einsum("bsgd,gde->bsge", h, v) + bv) @ w2


@case(
    "wx 8x8, bx 8, kernel 4x1x8, bc a_param 8, gate 2x4x4, bg 2x4, wo 8x8",
    "wx<bx kernel:pio<bc gate:sio<bg wo",
    free="a_param",
)
def griffin(x, wx, bx, kernel, bc, a_param, gate, bg, wo):
    """The recurrent block of Griffin, whose gates are block-diagonal."""
    h = conv(x @ wx + bx, kernel, groups=8) + bc
    z = joined(jax.nn.sigmoid(jnp.einsum("bthi,hij->bthj", heads(h), gate) + bg))
    a = jnp.exp(-8.0 * z * jax.nn.softplus(a_param))

    def combine(one, two):
        return one[0] * two[0], two[0] * one[1] + two[1]

    states = lax.associative_scan(combine, (a, h * jnp.sqrt(1 - a**2)), axis=1)[1]
    return (states * jax.nn.gelu(x)) @ wo


# The norm of the queries feeds a product of data with data, no layer: it stays with the
# layer before it under both policies.
@case("wq wk wv wo 8x8, gq gk 2x4", "wq<gq wk<gk wv wo", before="wq<gq wk<gk wv wo")
def query_key_norm(x, wq, wk, wv, wo, gq, gk):
    """A scale per head and dimension."""
    q, k, v = (heads(x @ w) for w in (wq, wk, wv))
    return attend(rms_norm(q, gq), rms_norm(k, gk), v) @ wo


# ---- Learned queries, and other parts computed from parameters alone -----------------
# Axes that are given are taken and the rest comes out right; an error names kernels
# before biases.


@case(
    "probe 1x1x8, q 8x2x4, bq 2x4, k 8x2x4, bk 2x4, v 8x2x4, o 8x3",
    "q:ioo<bq k:ioo<bk v:ioo o | probe",
    named="q",
    given=[{"q": "ioo"}, {"q": "ioo", "bq": None}],
)
def map_head(x, probe, q, bq, k, bk, v, o):
    """Attention pooling with a projected probe, kernels as in Flax."""
    q = jnp.einsum("bqd,dhk->bqhk", jnp.tile(probe, (2, 1, 1)), q) + bq
    k = jnp.einsum("bsd,dhk->bshk", x, k) + bk
    return attend(q, k, jnp.einsum("bsd,dhk->bshk", x, v)) @ o


@case(
    "probe 1x1x8, q 8x8, bq 8, k 8x8, bk 8, v 8x8, o 8x3",
    "q<bq k<bk v o | probe",
    named="q",
    given=[{"q": "io"}, {"q": "io", "bq": None}],
)
def map_head_of_matrices(x, probe, q, bq, k, bk, v, o):
    q = heads(jnp.tile(probe, (2, 1, 1)) @ q + bq)
    return attend(q, heads(x @ k + bk), heads(x @ v)) @ o


# The first norm acts on latents, behind no layer; the second on their sum with the
# output of attention.
@case(
    "wq wk wv wo w1 w2 8x8, latents 3x8, g1 c1 g2 c2 bk 8",
    "wq wk<bk wv wo<g2,c2 w1 w2 | latents g1 c1",
    named="wq",
    given=[{"wq": "io", "latents": None}],
)
@case(
    "wq wk wv wo w1 w2 8x8, latents 3x8, g1 c1 g2 c2 bk 8",
    "wq<g1,c1 wk<bk wv wo w1<g2,c2 w2 | latents",
    axes={"wq": axes("io")},
    norms="before",
)
def perceiver(x, latents, wq, wk, bk, wv, wo, w1, w2, g1, c1, g2, c2):
    """Latents that are parameters attend to the inputs."""
    z = jnp.broadcast_to(latents, (2, 3, 8))
    q = heads(layer_norm(z, g1, c1) @ wq)
    z = z + attend(q, heads(x @ wk + bk), heads(x @ wv)) @ wo
    return z + jax.nn.gelu(layer_norm(z, g2, c2) @ w1) @ w2


@case(
    "sq sk sv so cq ck cv co 8x8, bq bo 8, queries 3x8, g1 g2 8",
    "sq<bq sk sv so<bo,g1 cq ck cv co<g2 | queries",
    named="sq sk",
    given=[{"s[qk]": "io"}, {"s[qk]": "io", "queries": None}],
)
def detr_decoder(memory, queries, sq, bq, sk, sv, so, bo, cq, ck, cv, co, g1, g2):
    """The first block of a DETR decoder: targets of zeros, learned query positions."""
    position = jnp.broadcast_to(queries, (2, 3, 8))
    x = jnp.zeros_like(position)
    q, k = heads((x + position) @ sq + bq), heads((x + position) @ sk)
    x = rms_norm(x + attend(q, k, heads(x @ sv)) @ so + bo, g1)
    q, k, v = heads((x + position) @ cq), heads(memory @ ck), heads(memory @ cv)
    return rms_norm(x + attend(q, k, v) @ co, g2)


@case("z 4, h 4x48, hb 48, o 6x3", "h<hb o | z", named="h", given=[{"h": "io"}])
def hypernetwork(x, z, h, hb, o):
    """A kernel that is computed from a learned code."""
    return jnp.tanh(x @ (z @ h + hb).reshape(8, 6)) @ o


# ---- Stacks: kernels that run one after the other, or side by side with their biases -


@case("w 3x8x6, b 3x6, v 3x6x8", each(3, "w[#]:sio<b v[#]:sio"), [ROWS])
def loop(x, reverse=False, **stacks):
    """A loop runs slice by slice."""

    def body(x, p):
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], None

    return lax.scan(body, x, stacks, reverse=reverse)[0]


@case("w 2x8x6, b 2x6, v 2x6x8", "w[1]:sio<b v[1]:sio w[0]:sio<b v[0]:sio", [ROWS])
def loop_in_reverse(x, **stacks):
    return loop(x, reverse=True, **stacks)


# Two axes that are joined run one after the other; reversed, from the end.
for _name, _order, _rearrange in (
    ("joined", "0,0 0,1 0,2 1,0 1,1 1,2", lambda w: w.reshape(6, 8, 8)),
    ("turned", "1,2 1,1 1,0 0,2 0,1 0,0", lambda w: w.reshape(6, 8, 8)[::-1]),
    ("every other", "1,0 1,2", lambda w: w[1, ::2]),
):
    _verdict = " ".join(f"w[{i}]:ssio" for i in _order.split())

    @case("w 2x3x8x8", _verdict, [ROWS], name=f"loop over a stack, {_name}")
    def loop_over_a_rearranged_stack(x, w, rearrange=_rearrange):
        return lax.scan(lambda x, w: (x @ w, None), x, rearrange(w))[0]


@case("i 8x6, h 6x6, b 6", "i h<b", [array(7, 5, 8)])
def recurrent(x, i, h, b):
    """One layer, though its state starts constant."""

    def body(state, x):
        return jnp.tanh(x @ i + state @ h + b), None

    return lax.scan(body, jnp.zeros((5, 6)), x)[0]


# A bias of a sum follows its newest term, as in a loop.
@case("wi 8x24, wh 6x24, b 24, o 6x3", "wi wh<b o")
def unrolled_lstm(x, wi, wh, b, o):
    h = c = jnp.zeros((2, 6))
    for t in range(3):
        i, f, g, out = jnp.split(x[:, t] @ wi + h @ wh + b, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(out) * jnp.tanh(c)
    return h @ o


@case(
    "w1 3x8x16, b1 g c 3x16, w2 3x16x16, b2 3x16, w3 3x16x1, b3 3x1",
    "w1:sio<b1,c,g w2:sio<b2 w3:sio<b3",
    [ROWS],
)
def ensemble(x, **critics):
    """Critics of one input, by vmap."""

    def critic(p):
        y = jnp.tanh(layer_norm(x @ p["w1"] + p["b1"], p["g"], p["c"]))
        return jnp.tanh(y @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"]

    return jax.vmap(critic)(critics).min(0)


_EXPERTS = "w1 3x8x16, b1 3x16, w2 3x16x8, b2 3x8, router 8x3"


def _outputs_of_experts(x, w1, b1, w2, b2):
    h = jax.nn.relu(jnp.einsum("td,edf->tef", x, w1) + b1)
    return jnp.einsum("tef,efd->ted", h, w2) + b2


@case(_EXPERTS, "router w1:sio<b1 w2:sio<b2", [ROWS])
def experts(x, router, **params):
    gates = jax.nn.softmax(x @ router)
    return jnp.einsum("te,ted->td", gates, _outputs_of_experts(x, **params))


@case(_EXPERTS, "router w1:sio<b1 w2:sio<b2", [ROWS])
def experts_summed_by_hand(x, router, **params):
    gates = jax.nn.softmax(x @ router)[..., None]
    return (gates * _outputs_of_experts(x, **params)).sum(1)


# ---- Identities and side uses do not make a clear kernel unclear ---------------------


@case("w 8x4, b 4", "w<b", [X, array(4)])
def spectral_norm_with_state(x, u, w, b):
    v = lax.stop_gradient(w @ u / jnp.linalg.norm(w @ u))
    u = lax.stop_gradient(v @ w / jnp.linalg.norm(v @ w))
    return x @ (w / (v @ w @ u)) + b, u


@case(
    "w 8x4, b 4, v 4x3, table 5x8",
    "w<b v | table",
    [array(2, dtype=jnp.int32), array(2, 3)],
)
def penalty_in_the_loss(tokens, y, w, b, v, table):
    """A sum of squares of everything, added to the error of the prediction."""
    x = jnp.tanh(table[tokens] @ w + b) @ v
    return ((x - y) ** 2).mean() + sum((leaf**2).sum() for leaf in (w, b, v, table))


# ---- Tables of positions -------------------------------------------------------------
# They are looked up by constants or sliced, and added to data: no layer and no
# follower, whichever sizes happen to be equal.

BUCKETS = (np.arange(5)[None] - np.arange(5)[:, None]) % 4


def _by_index(table):
    return table[BUCKETS].transpose(2, 0, 1)[None]


def _by_one_hot(table):
    chosen = BUCKETS[None] == np.arange(4)[:, None, None]
    return jnp.einsum("nh,nqk->hqk", table, jnp.asarray(chosen, jnp.float32))[None]


# With two examples there are as many of them as heads.
for _batch, _look_up in itertools.product((2, 3), (_by_index, _by_one_hot)):

    @case(
        *("q k v o 8x8, table 4x2", "q k v o | table"),
        [array(_batch, 5, 8), array(_batch, 5, dtype=jnp.int32)],
        name=f"t5{_look_up.__name__}, {_batch} examples",
        given=[{"table": None}],
    )
    def t5(x, tokens, table, look_up=_look_up, **kernels):
        mask = tokens > 0
        mask = jnp.where(mask[:, None, :, None] & mask[:, None, None, :], 0.0, -1e9)
        return attention(x, **kernels, bias=mask + look_up(table))


for _size in (8, 5, 2):
    # Time is as wide as the model, and the batch too: nothing depends on it.
    @case(
        f"patch {_size}x8, patch_bias 8, positions 8x8, g b scale 8, w 8x8, head 8x3",
        "patch<g,patch_bias w<b,scale head | positions",
        [array(_size, 8, _size)],
        name=f"learned positions, {_size} images",
    )
    def learned_positions(x, patch, patch_bias, positions, g, w, b, scale, head):
        x = x @ patch + patch_bias + positions
        return (x + (rms_norm(x, g) @ w + b) * scale) @ head


@case(
    "image 8x4, text 6x4, logit_scale logit_bias ()",
    "image text | logit_scale logit_bias",
    [array(3, 8), array(3, 6)],
)
def contrastive(images, texts, image, text, logit_scale, logit_bias):
    """A scale and a bias of the products of two towers."""
    one, two = images @ image, texts @ text
    one = one / jnp.linalg.norm(one, axis=-1, keepdims=True)
    return one @ two.T * jnp.exp(logit_scale) + logit_bias


# ---- Uses that are each other's transpose have one spectrum --------------------------
# They make one layer, whose outputs are those of the forward use.


def _energy(x, w1, b1, w2, b2, w3):
    x = jnp.tanh(x @ w1 + b1)
    return (jnp.tanh(x @ w2 + b2) @ w3).sum()


_ENERGY = "w1 3x16, b1 16, w2 16x12, b2 12, w3 12x1", "w1<b1 w2<b2 w3"


@case(*_ENERGY, [array(5, 3)])
def forces(x, **p):
    return -jax.grad(_energy)(x, **p)


@case(*_ENERGY, [array(5, 3)])
def laplacian(x, **p):
    def one(z):
        return jnp.trace(jax.hessian(lambda z: _energy(z[None], **p))(z))

    return jax.vmap(one)(x)


@case(*_ENERGY, [array(5, 3)])
def gradient_penalty(x, **p):
    value, slope = jax.value_and_grad(_energy)(x, **p)
    return value + ((jnp.linalg.norm(slope, axis=-1) - 1) ** 2).mean()


# ---- Norms ---------------------------------------------------------------------------


_FUSED = "w0 8x8, g 8, qkv 8x24, o 8x8"
_PARTS = "qkv{8:16} qkv{16:24} o"


@case(_FUSED, "w0 qkv<g o", norms="before")
# Split, the norm follows the first part, the queries.
@case(_FUSED, f"w0 qkv{{0:8}}<g {_PARTS}", norms="before", split={"qkv": (1, 3)})
# Behind the layer before, no part is asked for.
@case(_FUSED, f"w0<g qkv{{0:8}} {_PARTS}", split={"qkv": (1, 3)})
def fused_attention(x, w0, g, qkv, o):
    x = x @ w0
    q, k, v = jnp.split(rms_norm(x, g) @ qkv, 3, -1)
    return x + attend(heads(q), heads(k), heads(v)) @ o


# A norm of one vector cannot follow a whole stack, only its first slice.
@case(
    "w0 8x8, g 8, qkv 3x8x8, o 8x8",
    "w0 qkv[0]:sio<g qkv[1]:sio qkv[2]:sio o",
    norms="before",
    axes={"qkv": axes("sio")},
)
def stacked_attention(x, w0, g, qkv, o):
    x = x @ w0
    q, k, v = jnp.einsum("btd,sdh->sbth", rms_norm(x, g), qkv)
    return x + attend(heads(q), heads(k), heads(v)) @ o


_CHUNKS = "w0 8x8, b0 g c 8, w1 8x6, b1 6", "w0<b0,c,g w1<b1", [array(6, 8)]
_BEFORE = "w0<b0 w1<b1,c,g"


@case(*_CHUNKS, before=_BEFORE)
def norm_inside_a_loop_over_chunks(x, w0, b0, g, c, w1, b1):
    def chunk(x):
        return jax.nn.relu(layer_norm(x @ w0 + b0, g, c)) @ w1 + b1

    return lax.map(chunk, x.reshape(3, 2, 8)).reshape(6, 6)


@case(
    "a 3x3x3x4, g c 8x8x4, b 3x3x4x6",
    "a:ppio<c,g b:ppio",
    [IMAGE],
    before="a:ppio b:ppio<c,g",
)
def norm_of_whole_images(x, a, g, c, b):
    return conv(jax.nn.relu(layer_norm(conv(x, a), g, c, (1, 2, 3))), b)


@case(
    "w 8x8, t1 4x8, b1 8, t2 8x8, g 8, o 8x3", "w<g t1<b1 t2 o", before="w t1<b1 t2 o<g"
)
def constant_time_embedding(x, w, t1, b1, t2, g, o):
    """An embedding that is computed from constants stands back behind data."""
    t = np.linspace(0, 1, 20, dtype=np.float32).reshape(5, 4)
    return rms_norm(x @ w + jax.nn.silu(t @ t1 + b1) @ t2, g) @ o


@case(
    "w1 8x8, g 8, film 4x16, film_bias 16, w2 8x8",
    "w1<g film<film_bias w2",
    [X, array(2, 4)],
    before="w1 film<film_bias w2<g",
)
def modulated(x, c, w1, g, film, film_bias, w2):
    h = rms_norm(x @ w1, g)
    scale, shift = jnp.split((c @ film + film_bias)[:, None], 2, -1)
    return jax.nn.silu(h * (1 + scale) + shift) @ w2


# ---- What has no reading, or may have one --------------------------------------------


# A complex leaf is no kernel; it is left out with that reason, or named as complex.
@case(
    {
        **{"b": array(8, 6, dtype=jnp.complex64), "nu": "6", "d": "8"},
        **{"c": array(6, 8, dtype=jnp.complex64), "w": "8x3"},
    },
    "w | b c nu",
    free="d",
    named="b c",
    says="complex",
    given=[{"[bc]": None}],
)
def linear_recurrence(x, b, nu, d, c, w):
    """A diagonal recurrence in complex numbers."""
    decay = jnp.exp(-jnp.exp(nu)).astype(jnp.complex64)

    def step(h, x):
        h = decay * h + x.astype(jnp.complex64) @ b
        return h, (h @ c).real

    y = lax.scan(step, jnp.zeros((2, 6), jnp.complex64), x.swapaxes(0, 1))[1]
    return (y.swapaxes(0, 1) + d * x) @ w


# ---- Whole blocks of well-known models -----------------------------------------------


@case(
    "w 8x8, a 1x2x8, o 8x3, bias 8",
    "w<bias o | a",
    [ROWS, array(7, 2, dtype=jnp.int32)],
)
def graph_attention_by_edges(x, edges, w, a, o, bias):
    """The published form: concatenated ends of each edge, a sum of products."""
    h = heads(x @ w + bias)
    ends = jnp.concatenate([h[edges[:, 0]], h[edges[:, 1]]], axis=-1)
    scores = jnp.exp(jax.nn.leaky_relu((ends * a).sum(-1)))
    total = jax.ops.segment_sum(scores, edges[:, 1], 5)
    messages = h[edges[:, 0]] * (scores / total[edges[:, 1]])[..., None]
    return joined(jax.ops.segment_sum(messages, edges[:, 1], 5)) @ o


# Both vectors are added to the queries, one for each of two products.
@case("wq wk wv wr wo 8x8, u v 2x4", "wq<u,v wk wv wr wo")
def transformer_xl(x, wq, wk, wv, wr, wo, u, v):
    """Relative positions: a kernel on constant sinusoids, and two biases per head."""
    q, k = heads(x @ wq), heads(x @ wk)
    values = heads(x @ wv)
    angles = np.arange(5.0)[:, None] / 10 ** np.arange(4.0)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)
    r = heads(jnp.asarray(waves) @ wr)
    bias = jnp.einsum("bqhd,khd->bhqk", q + v, r)
    return attend(q + u, k, values, bias) @ wo


@case(
    "g1 c1 8, qkv 8x24, qkv_bias 24, table 9x2, o 8x8, o_bias g2 c2 8, w1 8x16, b1 16, "
    "w2 16x8, b2 8, g3 c3 32, merge 32x16",
    "qkv<qkv_bias o<c2,g2,o_bias w1<b1 w2<b2,c3,g3 merge | g1 c1 table",
    [array(2, 4, 4, 8)],
    before="qkv<c1,g1,qkv_bias o<o_bias w1<b1,c2,g2 w2<b2 merge<c3,g3",
)
def swin(x, table, g1, c1, g2, c2, g3, c3, w1, b1, w2, b2, merge, **p):
    """A shifted window block with its table, followed by patch merging."""
    places = np.indices((2, 2)).reshape(2, 4)
    distance = places[:, :, None] - places[:, None] + 1
    index = distance[0] * 3 + distance[1]
    y = jnp.roll(layer_norm(x, g1, c1), (-1, -1), (1, 2))
    y = y.reshape(2, 2, 2, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(8, 4, 8)
    qkv = (y @ p["qkv"] + p["qkv_bias"]).reshape(8, 4, 3, 2, 4)
    bias = table[index.reshape(-1)].reshape(4, 4, 2).transpose(2, 0, 1)
    y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], bias[None])
    y = (y @ p["o"] + p["o_bias"]).reshape(2, 2, 2, 2, 2, 8)
    x = x + jnp.roll(y.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape), (1, 1), (1, 2))
    x = x + jax.nn.gelu(layer_norm(x, g2, c2) @ w1 + b1) @ w2 + b2
    quarters = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
    return layer_norm(jnp.concatenate(quarters, -1), g3, c3) @ merge


# The decay rates are multiplied with data that is constant along their second axis, but
# nothing is summed: no matrix product.  It takes more than the shapes to see that.
@case(
    "kernel 4x1x8, bias 8, bc 8x8, dt 8x8, dt_bias 8, rates 8x4, d 8, out 8x8",
    "kernel:pio<bias bc dt<dt_bias out | rates",
    free="d",
    named="rates",
    given=[{"rates": None}],
)
def mamba(x, kernel, bias, bc, dt, dt_bias, rates, d, out):
    x = jax.nn.silu(conv(x, kernel, groups=8) + bias)
    b, c = jnp.split(x @ bc, 2, -1)
    times = jax.nn.softplus(x @ dt + dt_bias)
    decay = jnp.exp(-times[..., None] * jnp.exp(rates))

    def step(h, now):
        decay, inputs, c = now
        h = decay * h + inputs
        return h, jnp.einsum("bdn,bn->bd", h, c)

    steps = (decay, (times * x)[..., None] * b[:, :, None], c)
    by_time = jax.tree.map(lambda a: a.swapaxes(0, 1), steps)
    y = lax.scan(step, jnp.zeros((2, 8, 4)), by_time)[1].swapaxes(0, 1)
    return (y + x * d) @ out


@case(
    "stem 8x6, g1 c1 6x5, t1 5x7, b1 7, t2 7x5, b2 5, g2 c2 5x6, m1 6x9, m2 9x6, g 6, "
    "head 6x3",
    "stem<c1,g1 t1<b1 t2<b2,c2,g2 m1 m2<g head",
    before="stem t1<b1,c1,g1 t2<b2 m1<c2,g2 m2 head<g",
)
def mixer(x, stem, g1, c1, t1, b1, t2, b2, g2, c2, m1, m2, g, head):
    """Scales of channels and patches, in the order of each product."""
    x = (x @ stem).swapaxes(1, 2)
    y = jax.nn.gelu(layer_norm(x, g1, c1, (1, 2)) @ t1 + b1) @ t2 + b2
    x = (x + y).swapaxes(1, 2)
    x = x + jax.nn.gelu(layer_norm(x, g2, c2, (1, 2)) @ m1) @ m2
    return rms_norm(x, g).mean(1) @ head


@case(
    "depthwise 7x7x1x8, b g c 8, up 8x32, down 32x8, gamma 8",
    "depthwise:ppio<b,c,g up down<gamma",
    [array(2, 8, 8, 8)],
    before="depthwise:ppio<b up<c,g down<gamma",
)
def convnext(x, depthwise, b, g, c, up, down, gamma):
    y = layer_norm(conv(x, depthwise, groups=8) + b, g, c)
    return x + gamma * (jax.nn.gelu(y @ up) @ down)


@case(
    "words 11x8, positions 5x8, types 2x8, g0 c0 8, q k v o 8x8, bo g1 c1 8, "
    "w1 8x16, b1 16, w2 16x8, b2 g2 c2 8, pooler 8x8, pooler_bias 8",
    "q k v o<bo,c1,g1 w1<b1 w2<b2,c2,g2 pooler<pooler_bias "
    "| words positions types g0 c0",
    [TOKENS, TOKENS],
    before="q<c0,g0 k v o<bo w1<b1,c1,g1 w2<b2 pooler<c2,g2,pooler_bias",
)
def bert(tokens, kinds, words, w1, b1, w2, b2, q, k, v, o, bo, **p):
    x = words[tokens] + p["positions"] + p["types"][kinds]
    x = layer_norm(x, p["g0"], p["c0"])
    x = layer_norm(x + attention(x, q, k, v, o) + bo, p["g1"], p["c1"])
    x = layer_norm(x + jax.nn.gelu(x @ w1 + b1) @ w2 + b2, p["g2"], p["c2"])
    return jnp.tanh(x[:, 0] @ p["pooler"] + p["pooler_bias"])


@case(
    "embed 11x8, g1 g2 g 8, q 8x4x2, k v 8x2x2, o 4x2x8, up gate 8x12, down 12x8, "
    "head 8x11",
    "q:ioo k:ioo v:ioo o:iio<g2 up gate down<g head | embed g1",
    [TOKENS],
    before="q:ioo<g1 k:ioo v:ioo o:iio up<g2 gate down head<g",
)
def llama(tokens, embed, g1, q, k, v, o, g2, up, gate, down, g, head):
    """Rotary positions, queries in groups, a gated unit, and a head of its own."""
    cos, sin = (f(jnp.arange(5.0))[:, None, None] for f in (jnp.cos, jnp.sin))

    def rotate(x):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    x = embed[tokens]
    y = rms_norm(x, g1)
    q, k, v = (jnp.einsum("btd,dhk->bthk", y, kernel) for kernel in (q, k, v))
    logits = jnp.einsum(
        "btghk,bsgk->bghts", rotate(q).reshape(2, 5, 2, 2, 2), rotate(k)
    )
    mask = jnp.tril(jnp.ones((5, 5), bool))
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30))
    y = jnp.einsum("bghts,bsgk->btghk", weights, v).reshape(2, 5, 4, 2)
    x = x + jnp.einsum("bthk,hkd->btd", y, o)
    y = rms_norm(x, g2)
    x = x + (jax.nn.silu(y @ up) * (y @ gate)) @ down
    return rms_norm(x, g) @ head


# Norms without parameters make no difference.
@case(
    "patch 8x8, t1 6x8, t2 8x8, labels 5x8, mod 8x48, mod_bias 48, q k v o 8x8, "
    "up 8x16, down 16x8, last_mod 8x16, last 8x8",
    "patch t1 t2 mod<mod_bias q k v o up down last_mod last | labels",
    [X, array(2), array(2, dtype=jnp.int32)],
    before="patch t1 t2 mod<mod_bias q k v o up down last_mod last",
)
def dit(x, t, label, patch, t1, t2, mod, mod_bias, up, down, last_mod, last, **p):
    """Modulation by data, norms without parameters, gates that start at zero."""

    def modulated(x, shift, scale):
        return rms_norm(x - x.mean(-1, keepdims=True), 1.0) * (1 + scale) + shift

    x = x @ patch
    angles = t[:, None] * jnp.exp(-jnp.arange(3.0))
    t = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    c = jax.nn.silu(jax.nn.silu(t @ t1) @ t2 + p.pop("labels")[label])[:, None]
    mods = jnp.split(c @ mod + mod_bias, 6, -1)
    x = x + mods[2] * attention(modulated(x, *mods[:2]), **p)
    x = x + mods[5] * (jax.nn.gelu(modulated(x, *mods[3:5]) @ up) @ down)
    return modulated(x, *jnp.split(c @ last_mod, 2, -1)) @ last


_T5_BLOCK = (
    "blocks/q[#]:isoo<blocks/n1 blocks/k[#]:isoo blocks/v[#]:isoo blocks/o[#]:isio "
    "blocks/wi0[#]:iso<blocks/n2 blocks/wi1[#]:iso blocks/wo[#]:iso "
)


@case(
    {
        "blocks": arrays(
            "n1 8x3, q k v 8x3x2x4, o 2x3x4x8, n2 8x3, wi0 wi1 8x3x6, wo 6x3x8"
        ),
        **{"embed": "11x8", "head": "8x11", "table": "4x2"},
    },
    f"{each(3, _T5_BLOCK)} head | embed table",
    [TOKENS],
    norms="before",
)
def t5_scanned_along_axis_1(tokens, blocks, embed, head, table):
    bias = _by_index(table)

    @jax.checkpoint
    def block(x, b):
        y = rms_norm(x, b["n1"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", y, b[n]) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k) + bias)
        x = x + jnp.einsum("bhqs,bshk,hkd->bqd", weights, v, b["o"])
        y = rms_norm(x, b["n2"])
        return x + (jax.nn.gelu(y @ b["wi0"]) * (y @ b["wi1"])) @ b["wo"], None

    stacks = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), blocks)
    return lax.scan(block, embed[tokens], stacks)[0] @ head


# Behind a concatenation a norm follows the newest layer, as in a DenseNet.
@case(
    "first 3x3x3x4, time 4x4, g1 c1 4, down 3x3x4x8, down_bias g2 c2 8, up 3x3x8x4, "
    "g3 c3 8, out 3x3x8x3, out_bias 3",
    "first:ppio<c1,g1 time down:ppio<c2,down_bias,g2 up:ppio<c3,g3 out:ppio<out_bias",
    [IMAGE, array(2, 4)],
    before="first:ppio time down:ppio<c1,down_bias,g1 up:ppio<c2,g2 "
    "out:ppio<c3,g3,out_bias",
)
def unet(x, t, first, time, g1, c1, down, down_bias, g2, c2, up, g3, c3, out, out_bias):
    skip = conv(x, first) + (t @ time)[:, None, None]
    x = conv(jax.nn.silu(group_norm(skip, g1, c1)), down, stride=2) + down_bias
    x = jax.image.resize(jax.nn.silu(group_norm(x, g2, c2)), (2, 8, 8, 8), "nearest")
    x = jnp.concatenate([conv(x, up), skip], -1)
    return conv(jax.nn.silu(group_norm(x, g3, c3)), out) + out_bias


# What a kernel is computed from follows it; the magnitude is a gain.
@case("w 8x6, a 8x2, b 2x6, bias m 6, o 6x3", "w<a,b,bias,m o")
def decomposed_adapter(x, w, a, b, bias, m, o):
    """DoRA: a sum of kernel and factors, rescaled to a learned magnitude."""
    w = w + a @ b
    return jnp.tanh(x @ (w / jnp.linalg.norm(w, axis=0) * m) + bias) @ o


# ---- What data changes, chooses or carries -------------------------------------------


@case("w 3x3x3x4, g c 4, o 4x3", "w:ppio<c,g o", [array(4), array(4), IMAGE])
def folded_batch_norm(mean, var, x, w, g, c, o):
    scale = g * lax.rsqrt(var + 1e-5)
    return jax.nn.relu(conv(x, w * scale) + c - mean * scale).mean((1, 2)) @ o


@case(
    "affine 4x8, w 3x3x8x6, b 6, rgb 3x3x6x3",
    "affine w:ppio<b rgb:ppio",
    [array(2, 4), array(2, 4, 4, 8)],
    given=[{"w": "ppio"}],
)
def modulated_convolution(z, x, affine, w, b, rgb):
    """StyleGAN2: each example scales the inputs of a kernel, which is normalized."""

    def one(x, scale):
        own = w * scale[:, None]
        return conv(x[None], own * lax.rsqrt((own**2).sum((0, 1, 2)) + 1e-8))[0]

    return conv(jax.nn.relu(jax.vmap(one)(x, z @ affine) + b), rgb)


@case("w 3x3x3x4, g c 4, o 4x3", "w:ppio<c,g o", [array(4), IMAGE])
def a_gain_after_the_statistics(var, x, w, g, c, o):
    return (conv(x, w * lax.rsqrt(var) * g) + c).mean((1, 2)) @ o


@case("w 3x3x3x4, b 4, o 4x3", "w:ppio<b o", [array(2, dtype=jnp.bool_), IMAGE])
def stochastic_depth(keep, x, w, b, o):
    """`cond` under `vmap` selects between a parameter and itself."""

    def block(x):
        return jax.nn.relu(conv(x[None], w) + b)[0]

    def one(keep, x):
        return lax.cond(keep, block, lambda x: jnp.tile(x[..., :1], 4), x)

    return jax.vmap(one)(keep, x).mean((1, 2)) @ o


@case("inner 8x8, w 8x8, b 8, out 8x3", "inner w<b out", [ROWS], named="w")
def test_time_training(x, inner, w, b, out):
    """A kernel that a loop trains on its way."""

    def step(w, x):
        return w - 0.1 * jnp.outer(x, x @ w - x), x @ w + b

    return lax.scan(step, w, x @ inner)[1] @ out


@case("w 16x8, h0 2x8", "w | h0", [array(5, 2, 8)])
def learned_initial_states(x, w, h0):
    def step(h, x):
        h = jnp.tanh(jnp.concatenate([x, h], -1) @ w)
        return h, h

    for start in h0:
        x = lax.scan(step, jnp.tile(start, (2, 1)), x)[1]
    return x


@case(
    "router 8x3, w 3x8x6, b 3x6, v 3x6x8, c 3x8",
    "router w:sio<b v:sio<c",
    [ROWS],
)
def experts_chosen_by_top_k(x, router, w, b, v, c):
    gates, own = lax.top_k(jax.nn.softmax(x @ router), 2)
    hidden = jax.nn.relu(jnp.einsum("td,tkdf->tkf", x, w[own]) + b[own])
    return (
        (jnp.einsum("tkf,tkfd->tkd", hidden, v[own]) + c[own]) * gates[..., None]
    ).sum(1)


@case(
    "router 8x3, w 3x8x6, b 3x6, v 3x6x8, c 3x8",
    "router w:sio<b v:sio<c",
    [ROWS],
)
def experts_in_sorted_rows(x, router, w, b, v, c):
    expert = jnp.argmax(x @ router, -1)
    order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=3)
    hidden = jax.nn.relu(lax.ragged_dot(x[order], w, sizes) + b[expert[order]])
    return lax.ragged_dot(hidden, v, sizes) + c[expert[order]]


@case(
    "embed 11x8, rows 11x2x4, gate 2x8x4, proj 2x4x8",
    "gate[0]:sio proj[0]:sio gate[1]:sio proj[1]:sio | embed rows",
    [TOKENS],
)
def embeddings_of_every_layer(tokens, embed, rows, gate, proj):
    """Gemma 3n: rows of a table with an axis for the layers."""
    x, own = embed[tokens], rows[tokens]
    for i in range(2):
        x = x + (jax.nn.gelu(x @ gate[i]) * own[:, :, i]) @ proj[i]
    return x


@case(
    "w 8x6, b 6, o 6x3",
    "w<b o",
    [array(2, 7, dtype=jnp.int32), X],
)
def gathered_in_batches(index, x, w, b, o):
    return jax.vmap(lambda x, i: jnp.tanh((x @ w)[i] + b) @ o)(x, index)


@case(
    "w 3x3x3x8x8, o 8x3",
    f"{each(3, 'w[#]:sppio')} o",
    [array(3, 3, 3, 8, 8), array(2, 4, 4, 8)],
)
def pruned_scan_of_convolutions(masks, x, w, o):
    """The stack is changed as a whole, and sliced by the loop."""
    x = lax.scan(lambda x, w: (jax.nn.relu(conv(x, w)), None), x, w * masks)[0]
    return x.mean((1, 2)) @ o


@case(
    "w 3x3x3x8x6, o 6x3",
    "w:sppio o",
    [array(dtype=jnp.int32), array(3, 3, 3, 8, 6), array(2, 4, 4, 8)],
)
def a_pruned_kernel_that_data_picks(i, masks, x, w, o):
    return conv(x, (w * masks)[i]).mean((1, 2)) @ o


@case(
    "w 4x8x6, scale 4x6, o 6x3",
    "w:sio o | scale",
    [array(5, dtype=jnp.int32), ROWS],
    named="w",
)
def scaled_experts(own, x, w, scale, o):
    """Experts in low precision, each with a scale for each output."""
    return jnp.einsum("ti,tio->to", x, w[own] * scale[own][:, None]) @ o


@case("w 2x3x3x8x6, o 6x3", "", [array(dtype=jnp.bool_), array(2, 4, 4, 8)], named="w")
def one_of_two_convolutions(flag, x, w, o):
    return conv(x, jnp.where(flag, w[0], w[1])).mean((1, 2)) @ o


@case("w 11x8, b 8, o 8x3", "w<b o", [array(5, 5), array(5, dtype=jnp.int32)])
def atoms_of_a_graph(adjacency, atoms, w, b, o):
    """Sums of one-hot rows are data."""
    return jnp.tanh((adjacency @ jax.nn.one_hot(atoms, 11)) @ w + b) @ o


@case("w 8x6, styles 11x2x6, o 6x3", "w o | styles", [TOKENS, X])
def scales_and_shifts_of_a_class(classes, x, w, styles, o):
    own = styles[classes]
    return (x @ w * (1 + own[..., 0, :]) + own[..., 1, :]) @ o


@case("rows 11x2x8, w 8x6, b 6", "w<b | rows", [TOKENS])
def a_step_with_rows_of_two_axes(tokens, **params):
    def loss(p):
        return jnp.tanh(p["rows"][tokens] @ p["w"] + p["b"]).sum()

    return jax.value_and_grad(loss)(params)


@case("w 8x6, g c 6, pos 5x6, o 6x3", "w<c,g o | pos", [array(2, 5, 1), X])
def positions_where_nothing_is_masked(mask, x, w, g, c, pos, o):
    """A row that is scaled and then averaged over its own entries is no product."""
    return layer_norm(mask * pos + (1 - mask) * (x @ w), g, c) @ o


@case("w 8x6, v 6x8, b scale 8, o 8x3", "w v<b,scale o", [array(2, 1, 1), X])
def layer_scale_with_stochastic_depth(keep, x, w, v, b, scale, o):
    return (x + keep * scale * (jnp.tanh(x @ w) @ v + b)) @ o


@case("q k v o 8x8, bias 2x5x5", "q k v o | bias", [array(2, 1, 1, 5), X])
def a_masked_bias_of_scores(mask, x, q, k, v, o, bias):
    q, k, v = (heads(x @ own) for own in (q, k, v))
    return attend(q, k, v, bias * mask) @ o


# ---- Kernels that are computed, and products that are no `dot` -----------------------


# The factors of one kernel, which no reading tells from learned queries.
@case("lower upper 8x8, s 8", "", named="upper lower")
def invertible_convolution(x, lower, upper, s):
    """Glow: the factors of an LU decomposition."""
    lower = jnp.tril(lower, -1) + jnp.eye(8)
    return x @ (lower @ (jnp.triu(upper, 1) + jnp.diag(jnp.exp(s))))


@case("orbitals 8x4, sigma pi 3x4", "", [array(4, 8), array(4, 3)], named="sigma")
def envelope(h, r, orbitals, sigma, pi):
    """FermiNet: decay rates for each nucleus and orbital."""
    return h @ orbitals * (jnp.exp(-r[..., None] * sigma) * pi).sum(1)


@case(
    "const 1x4x4x8, w 3x3x8x6, b 6, affine 4x6",
    "w:ppio<b affine | const",
    [array(2, 4)],
    named="w",
    given=[{"w": "ppio", "const": None}],
)
def learned_canvas(z, const, w, b, affine):
    """StyleGAN: the first convolution has a learned image for its input."""
    return jax.nn.relu(conv(const, w) + b) * (z @ affine)[:, None, None]


@case("w 8x6, b 6", "w", [ROWS], named="w", free="b", given=[{"w": "io"}])
def picked_columns(x, w, b):
    keep = np.asarray([0, 2, 3, 5])
    return x @ w[:, keep] + b[keep]


# ---- Gradients read as their forward passes do ---------------------------------------


@case("g 8, w 8x6, v 6x1", "w v | g", [ROWS], given=[{"[wv]": "io"}])
def forces_of_a_normed_input(x, g, w, v):
    return jax.grad(lambda x: (jnp.tanh(rms_norm(x, g) @ w) @ v).sum())(x)


@case("w 8x6, b g c 6, v 6x1", "w<b,c,g v", [ROWS], given=[{"[wv]": "io"}])
def forces_of_a_normed_layer(x, w, b, g, c, v):
    return jax.grad(lambda x: (layer_norm(x @ w + b, g, c) @ v).sum())(x)


@case("embed 11x8, pos 5x8, w 8x6, o 6x3", "w o | embed pos", [TOKENS])
def a_step_with_learned_positions(tokens, **params):
    def loss(p):
        return (jnp.tanh((p["embed"][tokens] + p["pos"]) @ p["w"]) @ p["o"]).sum()

    return jax.value_and_grad(loss)(params)


# ---- Stacks and parts, whatever their sizes ------------------------------------------


@case(
    {"blocks": arrays("g 2x8, qkv 2x8x24, o 2x8x8")},
    each(
        2,
        "blocks/qkv[#]{0:8}:sio<.g blocks/qkv[#]{8:16}:sio blocks/qkv[#]{16:24}:sio "
        "blocks/o[#]:sio ",
    ),
    norms="before",
    split={"*qkv": (2, 3)},
)
def scanned_parts(x, blocks):
    def block(x, own):
        q, k, v = jnp.split(rms_norm(x, own["g"]) @ own["qkv"], 3, -1)
        return x + jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v @ own["o"], None

    return lax.scan(block, x, blocks)[0]


# ---- Other ways to name and to average -----------------------------------------------


@case(
    {"w[0]": "4x8x6", "w0": "8x6", "w*": "6x3"},
    "",
    [ROWS],
    named="w[0]",
)
def brackets_in_names(x, **params):
    hidden = jnp.einsum("td,edf->tef", x, params["w[0]"]).sum(1) + x @ params["w0"]
    return hidden @ params["w*"]


@case("q k 8x8, b c 8, o 8x3", "q<b k<c o", [ROWS])
def halves_that_are_scaled_before_their_biases(x, q, k, b, c, o):
    both = x @ jnp.concatenate([q, k], 1)
    left, right = jnp.tanh(both[:, :8] * 0.5 + b), jnp.tanh(both[:, 8:] * 2.0 + c)
    return (left * right) @ o
