"""`find_layers` on flat dicts with the names of PyTorch and Hugging Face."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tb_optax
from tb_optax import Layer, MatrixAxes
from tb_optax.find import read_leaves
from tb_optax.leaves import leaves_of

LINEAR = MatrixAxes((1,), (0,))
GPT2_CONV1D = MatrixAxes((0,), (1,))
CONV1D = MatrixAxes((1,), (0,), pooled=(2,))
CONV2D = MatrixAxes((1,), (0,), pooled=(2, 3))
UP2D = MatrixAxes((0,), (1,), pooled=(2, 3))
CONV3D = MatrixAxes((1,), (0,), pooled=(2, 3, 4))
KERNELS = {
    "linear": LINEAR,
    "(in,out)": GPT2_CONV1D,
    "conv1d": CONV1D,
    "conv2d": CONV2D,
    "up2d": UP2D,
    "conv3d": CONV3D,
    "hwio": MatrixAxes((2,), (3,), pooled=(0, 1)),
}
REASONS = {
    "table": "look-up table",
    "vector": "rank < 2",
    "integers": "not floating",
}

# Key, shape, what it is, and for kernels what follows; from the classes of the models.
MODELS = {
    "bert": """
        embeddings.position_ids 1x16 integers
        embeddings.LayerNorm.weight 8 norm
        embeddings.LayerNorm.bias 8 norm
        embeddings.position_embeddings.weight 16x8 embedding
        embeddings.token_type_embeddings.weight 2x8 embedding
        embeddings.word_embeddings.weight 30x8 embedding
        encoder.layer.0.attention.output.LayerNorm.weight 8 norm
        encoder.layer.0.attention.output.dense.bias 8 follows
        encoder.layer.0.attention.output.dense.weight 8x8 linear .bias
        encoder.layer.0.attention.self.query.bias 8 follows
        encoder.layer.0.attention.self.query.weight 8x8 linear .bias
        encoder.layer.0.intermediate.dense.bias 24 follows
        encoder.layer.0.intermediate.dense.weight 24x8 linear .bias
        pooler.dense.bias 8 follows
        pooler.dense.weight 8x8 linear .bias
    """,
    "gpt2": """
        h.0.attn.bias 1x1x16x16 bias
        h.0.attn.c_attn.bias 24 follows
        h.0.attn.c_attn.weight 8x24 (in,out) .bias
        h.0.attn.c_proj.bias 8 follows
        h.0.attn.c_proj.weight 8x8 (in,out) .bias
        h.0.ln_1.bias 8 norm
        h.0.ln_1.weight 8 norm
        h.0.mlp.c_fc.bias 32 follows
        h.0.mlp.c_fc.weight 8x32 (in,out) .bias
        h.0.mlp.c_proj.bias 8 follows
        h.0.mlp.c_proj.weight 32x8 (in,out) .bias
        lm_head.weight 30x8 linear
        ln_f.weight 8 norm
        wpe.weight 16x8 embedding
        wte.weight 30x8 embedding
    """,
    "the names of gpt2 with linear layers": """
        transformer.h.0.attn.c_attn.bias 24 follows
        transformer.h.0.attn.c_attn.weight 24x8 linear .bias
        transformer.h.0.attn.c_proj.bias 8 follows
        transformer.h.0.attn.c_proj.weight 8x8 linear .bias
        transformer.h.0.mlp.c_proj.weight 8x32 linear
    """,
    "ctrl": """
        h.0.multi_head_attention.Wq.bias 8 follows
        h.0.multi_head_attention.Wq.weight 8x8 linear .bias
        w.weight 30x8 asks
    """,
    "llama": """
        lm_head.weight 30x8 linear
        model.embed_tokens.weight 30x8 embedding
        model.layers.0.input_layernorm.weight 8 norm
        model.layers.0.mlp.down_proj.weight 8x24 linear
        model.layers.0.mlp.gate_proj.weight 24x8 linear
        model.layers.0.self_attn.k_proj.weight 4x8 linear
        model.layers.0.self_attn.q_proj.bias 8 follows
        model.layers.0.self_attn.q_proj.weight 8x8 linear .bias
        model.layers.0.self_attn.rotary_emb.inv_freq 4 vector
        model.norm.weight 8 norm
    """,
    "mixtral": """
        model.layers.0.block_sparse_moe.experts.0.w1.weight 24x8 linear
        model.layers.0.block_sparse_moe.gate.weight 4x8 linear
    """,
    "gpt_neox": """
        embed_out.weight 30x8 linear
        gpt_neox.embed_in.weight 30x8 embedding
        gpt_neox.layers.0.attention.query_key_value.bias 24 follows
        gpt_neox.layers.0.attention.query_key_value.weight 24x8 linear .bias
    """,
    "t5": """
        decoder.block.0.layer.1.EncDecAttention.q.weight 8x8 linear
        block.0.layer.0.SelfAttention.k.weight 8x8 linear
        block.0.layer.0.SelfAttention.relative_attention_bias.weight 32x2 embedding
        encoder.block.0.layer.0.layer_norm.weight 8 norm
        encoder.block.0.layer.1.DenseReluDense.wi.weight 24x8 linear
        encoder.embed_tokens.weight 30x8 embedding
        shared.weight 30x8 embedding
    """,
    "vit": """
        vit.embeddings.cls_token 1x1x8 vector
        vit.embeddings.patch_embeddings.projection.bias 8 follows
        vit.embeddings.patch_embeddings.projection.weight 8x3x4x4 conv2d .bias
        vit.embeddings.position_embeddings 1x17x8 embedding
        vit.encoder.layer.0.layernorm_after.weight 8 norm
        vit.encoder.layer.0.output.dense.bias 8 follows
        vit.encoder.layer.0.output.dense.weight 8x24 linear .bias
    """,
    "vit of timm": """
        blocks.0.attn.q_bias 8 bias
        blocks.0.attn.qkv.weight 24x8 linear
        blocks.0.ls1.gamma 8 norm
        blocks.0.norm1.bias 8 norm
        patch_embed.proj.bias 8 follows
        patch_embed.proj.weight 8x3x4x4 conv2d .bias
        pos_embed 1x17x8 embedding
    """,
    "video": """
        visual.patch_embed.proj.weight 8x3x2x4x4 conv3d
        visual.rel_pos_h 7x4 table
    """,
    "swin": """
        layers.0.blocks.0.attn.relative_position_bias_table 9x2 table
        layers.0.blocks.0.attn.relative_position_index 4x4 integers
        layers.0.downsample.reduction.weight 16x32 linear
    """,
    "resnet": """
        bn1.bias 8 follows
        bn1.num_batches_tracked () integers
        bn1.running_mean 8 vector
        bn1.weight 8 follows
        conv1.weight 8x3x7x7 conv2d bn1.bias bn1.weight
        fc.bias 10 follows
        fc.weight 10x16 linear .bias
        layer2.0.bn1.bias 16 follows
        layer2.0.bn1.weight 16 follows
        layer2.0.conv1.weight 16x8x3x3 conv2d layer2.0.bn1.bias layer2.0.bn1.weight
        layer2.0.downsample.0.weight 16x8x1x1 conv2d
        layer2.0.downsample.1.bias 16 norm
        layer2.0.downsample.1.running_mean 16 vector
        layer2.0.downsample.1.weight 16 norm
    """,
    "resnet of hugging face": """
        stem.convolution.weight 8x3x7x7 conv2d stem.normalization.weight
        stem.normalization.running_var 8 vector
        stem.normalization.weight 8 follows
    """,
    "vgg": """
        features.0.bias 8 follows
        features.0.weight 8x3x3x3 conv2d .bias
        features.3.weight 8x8x3x3 conv2d
        features.4.running_mean 8 vector
        features.4.weight 8 norm
        features.7.weight 8x8x3x3 asks
    """,
    "unet": """
        down_blocks.0.attentions.0.to_out.0.bias 8 follows
        down_blocks.0.attentions.0.to_out.0.weight 8x8 linear .bias
        down_blocks.0.attentions.0.to_q.weight 8x8 linear
        down_blocks.0.proj_in.bias 8 follows
        down_blocks.0.proj_in.weight 8x8x1x1 conv2d .bias
        down_blocks.0.resnets.0.time_emb_proj.bias 8 follows
        down_blocks.0.resnets.0.time_emb_proj.weight 8x16 linear .bias
        time_embed.0.bias 16 follows
        time_embed.0.weight 16x8 linear .bias
        up.conv.bias 4 follows
        up.conv.weight 8x4x2x2 up2d .bias
    """,
    "clip": """
        logit_scale () vector
        text_model.embeddings.token_embedding.weight 30x8 embedding
        text_projection.weight 6x8 linear
        vision_model.embeddings.class_embedding 8 embedding
        vision_model.embeddings.patch_embedding.weight 8x3x4x4 conv2d
        vision_model.pre_layrnorm.weight 8 norm
    """,
    "whisper": """
        model.encoder.conv1.bias 8 follows
        model.encoder.conv1.weight 8x4x3 conv1d .bias
        model.encoder.embed_positions.weight 16x8 embedding
    """,
    "mamba": """
        backbone.embeddings.weight 30x8 embedding
        backbone.layers.0.mixer.A_log 16x4 asks
        backbone.layers.0.mixer.D 16 vector
        backbone.layers.0.mixer.conv1d.bias 16 follows
        backbone.layers.0.mixer.conv1d.weight 16x1x4 conv1d .bias
        backbone.layers.0.mixer.dt_proj.bias 16 follows
        backbone.layers.0.mixer.dt_proj.weight 16x2 linear .bias
    """,
    "modules of torch": """
        attn.bias_k 1x1x8 bias
        attn.in_proj_bias 24 follows
        attn.in_proj_weight 24x8 linear attn.in_proj_bias
        attn.out_proj.bias 8 follows
        attn.out_proj.weight 8x8 linear .bias
        bilinear.bias 4 bias
        bilinear.weight 4x8x8 asks
        critic.bias 1 follows
        critic.weight 1x8 linear .bias
        rnn.bias_hh_l0 24 follows
        rnn.bias_ih_l0 24 follows
        rnn.weight_hh_l0 24x8 linear rnn.bias_hh_l0
        rnn.weight_ih_l0 24x4 linear rnn.bias_ih_l0
        wn.conv.weight_g 1x1x3 vector
        wn.conv.weight_v 8x4x3 asks
        0.weight 30x8 asks
        1.bias 5 bias
        1.weight 8x4 asks
    """,
    "flat names of flax": """
        params.Conv_0.bias 6 follows
        params.Conv_0.kernel 3x3x4x6 hwio .bias
        params.Dense_0.kernel 8x4 (in,out)
        params.LayerNorm_0.scale 4 norm
    """,
}


def parse(text: str):
    """Arrays, expected verdicts and followers of a model."""
    params, verdicts, follows = {}, {}, {}
    for line in text.strip().splitlines():
        key, sizes, verdict, *others = line.split()
        shape = () if sizes == "()" else tuple(map(int, sizes.split("x")))
        dtype = jnp.int32 if verdict == "integers" else jnp.float32
        params[key] = jax.ShapeDtypeStruct(shape, dtype)
        verdicts[key] = verdict
        follows[key] = tuple(
            key.rpartition(".")[0] + other if other == ".bias" else other
            for other in others
        )
    return params, verdicts, follows


@pytest.mark.parametrize("model", MODELS)
def test_names_of_published_models(model):
    """Every key gets its verdict; what is asked for can be left out."""
    params, verdicts, follows = parse(MODELS[model])
    asks = [key for key, verdict in verdicts.items() if verdict == "asks"]
    if asks:
        with pytest.raises(
            ValueError, match=f"cannot tell how to read {len(asks)} "
        ) as e:
            tb_optax.find_layers(params)
        named = re.findall(r"^ +'(.*?)' of shape", str(e.value), re.MULTILINE)
        assert sorted(named) == sorted(asks)
    found = tb_optax.find_layers(params, axes=dict.fromkeys(asks))
    layers = {layer.path: (layer.axes, layer.follows) for layer in found}
    assert layers == {
        key: (KERNELS[verdict], follows[key])
        for key, verdict in verdicts.items()
        if verdict in KERNELS
    }
    readings = read_leaves(leaves_of(params))
    for key, verdict in verdicts.items():
        reading = readings[key]
        assert reading.unclear == (verdict == "asks"), key
        if verdict not in (*KERNELS, "follows", "asks"):
            assert reading.reason == REASONS.get(verdict, verdict), key


@pytest.mark.parametrize("model", MODELS)
def test_every_leaf_is_accounted_for(model):
    """A leaf with two long axes is a kernel, has a reason, or is asked for."""
    params, verdicts, _ = parse(MODELS[model])
    asks = [key for key, verdict in verdicts.items() if verdict == "asks"]
    layers = tb_optax.find_layers(params, axes=dict.fromkeys(asks))
    owned = {path for layer in layers for path in (layer.path, *layer.follows)}
    rows = {row["leaf"]: row for row in tb_optax.describe(params, layers)}
    assert rows.keys() == params.keys()
    for key, row in rows.items():
        assert bool(row["layer"]) == (key in owned), key
        assert row["note"], key
        assert bool(row["layer"]) or row["note"] != "follows"


def test_layers_come_in_numeric_order():
    """10 after 9, wherever the number is; whatever the order of the dict."""
    names = [f"model.layers.{i}.fc{j}.weight" for i in range(12) for j in (9, 10)]
    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    found = tb_optax.find_layers(dict.fromkeys(reversed(names), shape))
    assert [layer.path for layer in found] == names


def test_arrays_of_a_file_are_analyzed():
    """NumPy arrays under dotted keys, in any float type, with the key for a path."""
    rng = np.random.default_rng(0)
    params = {
        "net.9.weight": rng.normal(size=(12, 8)).astype(np.float32),
        "net.9.bias": np.zeros(12, np.float32),
        "net.10.conv.weight": rng.normal(size=(6, 4, 3, 3)).astype(np.float16),
        "embed.weight": rng.normal(size=(30, 8)).astype(np.float32),
    }
    layers = tb_optax.find_layers(params)
    assert layers == (
        Layer("net.9.weight", LINEAR, ("net.9.bias",)),
        Layer("net.10.conv.weight", CONV2D),
    )
    analysis = tb_optax.layer_analysis(layers, min_eigenvalues=4)(params)
    assert analysis.eigenvalue_count.tolist() == [8, 36]
    multipliers = analysis.leaf_multipliers(params)
    assert multipliers["net.9.bias"] == multipliers["net.9.weight"]
    assert multipliers["embed.weight"] == 1
    # A file inside a larger tree keeps its keys.
    (nested, _) = tb_optax.find_layers({"model": params})
    assert nested.path == "model/net.9.weight"
    assert nested.follows == ("model/net.9.bias",)


def test_axes_settle_dotted_names():
    params = {
        "mixer.0.A_log": jax.ShapeDtypeStruct((16, 4), jnp.float32),
        "mixer.0.experts.up_proj": jax.ShapeDtypeStruct((4, 8, 6), jnp.float32),
        "mixer.0.in_proj.weight": jax.ShapeDtypeStruct((16, 4), jnp.float32),
    }
    stack = MatrixAxes((2,), (1,), stacked=(0,))
    axes = {"*.A_log": None, "*.experts.*": stack}
    found = tb_optax.find_layers(params, axes=axes)
    assert [layer.axes for layer in found] == [stack, LINEAR]


# A `kernel` of rank 4 is a convolution only with a sign of one.
HWIO = MatrixAxes((2,), (3,), pooled=(0, 1))
SIGNS = {
    "the name of its module": {"Conv_0": {"kernel": (3, 3, 8, 6)}},
    "a bias of the last size": {"stem": {"kernel": (3, 3, 8, 6), "bias": (6,)}},
    "a bias and no module": {"kernel": (3, 3, 8, 6), "bias": (6,)},
    "a sibling": {
        "block": {
            "conv1": {"kernel": (3, 3, 8, 6)},
            "shortcut": {"kernel": (1, 1, 8, 6)},
        }
    },
    "a name in haiku": {"net/~/conv2_d_transpose": {"w": (3, 3, 8, 6)}},
}
NO_SIGNS = {
    "gemma": {"attn": {"qkv_einsum": {"kernel": (3, 4, 64, 16)}}},
    "gemma with norms beside it": {
        "attn": {
            "qkv_einsum": {"kernel": (3, 4, 64, 16)},
            "query_norm": {"scale": (16,)},
        }
    },
    "a root": {"kernel": (3, 3, 8, 6)},
    "an unknown module": {"mix": {"kernel": (3, 3, 8, 6)}},
    "positions that share nothing": {"ConvLocal_0": {"kernel": (5, 5, 72, 4)}},
    "a bias that is another": {"conv": {"kernel": (3, 3, 8, 6), "bias": (3, 6)}},
    "a dense layer of several inputs": {
        "DenseGeneral_0": {"kernel": (5, 4, 8, 6), "bias": (6,)}
    },
    "a sibling of another rank": {
        "mixer": {"conv1d": {"w": (4, 1, 8)}, "mix": {"kernel": (3, 3, 8, 6)}}
    },
}


def arrays(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def matrices_of_rank_4(params) -> dict[str, tb_optax.find.Reading]:
    leaves = leaves_of(params)
    readings = read_leaves(leaves)
    return {p: readings[p] for p, leaf in leaves.items() if len(leaf.shape) == 4}


@pytest.mark.parametrize("tree", SIGNS.values(), ids=SIGNS)
def test_signs_of_a_convolution(tree):
    for reading in matrices_of_rank_4(arrays(tree)).values():
        assert reading.axes == HWIO


@pytest.mark.parametrize("tree", NO_SIGNS.values(), ids=NO_SIGNS)
def test_no_sign_of_a_convolution(tree):
    for reading in matrices_of_rank_4(arrays(tree)).values():
        assert reading.axes is None
        assert reading.unclear


def test_the_class_of_a_module_is_a_sign():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(8, 6, (3, 3), use_bias=False, rngs=rngs)
            self.mix = nnx.Einsum("abcd,...c->ab...d", (3, 3, 8, 6), rngs=rngs)

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    (layer,) = tb_optax.find_layers(model, axes={"mix/kernel": None})
    assert layer == Layer("stem/kernel", HWIO)
    with pytest.raises(ValueError, match="'mix/kernel' of shape"):
        tb_optax.find_layers(model)


def test_complex_leaves_are_called_complex():
    params = {"w": jax.ShapeDtypeStruct((8, 6), jnp.complex64)}
    (row,) = tb_optax.describe(params, [])
    assert row["note"] == "complex"


def test_shapes_alone_never_make_a_convolution():
    """All permutations of one shape under a name without a sign are asked for."""
    for shape in [(3, 3, 8, 6), (8, 6, 3, 3), (6, 8, 3, 3), (8, 3, 3, 6)]:
        params = {"block.0.weight": jax.ShapeDtypeStruct(shape, jnp.float32)}
        with pytest.raises(ValueError, match="without a sign of a convolution"):
            tb_optax.find_layers(params)
