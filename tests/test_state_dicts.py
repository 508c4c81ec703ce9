"""`find_layers` on flat dicts with the names of PyTorch and Hugging Face."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from notation import array, arrays, axes, layers, shape

import tb_optax
from tb_optax import Layer
from tb_optax.find import read_leaves
from tb_optax.leaves import leaves_of

KERNELS = {
    **{"linear": "oi", "(in,out)": "io", "conv1d": "oip", "conv2d": "oipp"},
    **{"conv3d": "oippp", "up2d": "iopp", "hwio": "ppio"},
}
REASONS = {
    "table": "look-up table",
    "vector": "rank < 2",
    "integers": "not floating",
}

# Key, shape, what it is, and of kernels what follows and its size; from the classes of
# the models.  `ln.bias,weight` are two leaves of one module.
MODELS = {
    "bert": """
        embeddings.position_ids 1x16 integers
        embeddings.LayerNorm.bias,weight 8 norm
        embeddings.token_type_embeddings.weight 2x8 embedding
        encoder.layer.0.attention.self.query.weight 8x8 linear .bias=8
        encoder.layer.0.intermediate.dense.weight 24x8 linear .bias=24
        pooler.dense.weight 8x8 linear .bias=8
    """,
    "gpt2": """
        h.0.attn.bias 1x1x16x16 bias
        h.0.attn.c_attn.weight 8x24 (in,out) .bias=24
        h.0.attn.c_proj.weight 8x8 (in,out) .bias=8
        h.0.ln_1.bias,weight 8 norm
        h.0.mlp.c_fc.weight 8x32 (in,out) .bias=32
        h.0.mlp.c_proj.weight 32x8 (in,out) .bias=8
        lm_head.weight 30x8 linear
        ln_f.weight 8 norm
        wpe.weight 16x8 embedding
        wte.weight 30x8 embedding
    """,
    "ctrl": """
        h.0.multi_head_attention.Wq.weight 8x8 linear .bias=8
        w.weight 30x8 asks
    """,
    "llama": """
        lm_head.weight 30x8 linear
        model.embed_tokens.weight 30x8 embedding
        model.layers.0.input_layernorm.weight 8 norm
        model.layers.0.mlp.gate_proj.weight 24x8 linear
        model.layers.0.self_attn.q_proj.weight 8x8 linear .bias=8
        model.layers.0.self_attn.rotary_emb.inv_freq 4 vector
        model.norm.weight 8 norm
    """,
    "gpt_neox": """
        embed_out.weight 30x8 linear
        gpt_neox.embed_in.weight 30x8 embedding
        gpt_neox.layers.0.attention.query_key_value.weight 24x8 linear .bias=24
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
        vit.embeddings.patch_embeddings.projection.weight 8x3x4x4 conv2d .bias=8
        vit.embeddings.position_embeddings 1x17x8 embedding
        vit.encoder.layer.0.layernorm_after.weight 8 norm
        vit.encoder.layer.0.output.dense.weight 8x24 linear .bias=8
    """,
    "vit of timm": """
        blocks.0.attn.q_bias 8 bias
        blocks.0.attn.qkv.weight 24x8 linear
        blocks.0.ls1.gamma 8 norm
        blocks.0.norm1.bias 8 norm
        patch_embed.proj.weight 8x3x4x4 conv2d .bias=8
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
        bn1.num_batches_tracked () integers
        bn1.running_mean 8 vector
        conv1.weight 8x3x7x7 conv2d bn1.bias=8 bn1.weight=8
        fc.weight 10x16 linear .bias=10
        layer2.0.conv1.weight 9x8x3x3 conv2d layer2.0.bn1.bias=9 layer2.0.bn1.weight=9
        layer2.0.downsample.0.weight 16x8x1x1 conv2d
        layer2.0.downsample.1.bias,weight 16 norm
        layer2.0.downsample.1.running_mean 16 vector
    """,
    "resnet of hugging face": """
        stem.convolution.weight 8x3x7x7 conv2d stem.normalization.weight=8
        stem.normalization.running_var 8 vector
    """,
    "vgg": """
        features.0.weight 8x3x3x3 conv2d .bias=8
        features.3.weight 8x8x3x3 conv2d
        features.4.running_mean 8 vector
        features.4.weight 8 norm
        features.7.weight 8x8x3x3 asks
    """,
    "unet": """
        down_blocks.0.attentions.0.to_out.0.weight 8x8 linear .bias=8
        down_blocks.0.attentions.0.to_q.weight 8x8 linear
        down_blocks.0.proj_in.weight 8x8x1x1 conv2d .bias=8
        down_blocks.0.resnets.0.time_emb_proj.weight 8x16 linear .bias=8
        time_embed.0.weight 16x8 linear .bias=16
        up.conv.weight 8x4x2x2 up2d .bias=4
    """,
    "clip": """
        logit_scale () vector
        text_model.embeddings.token_embedding.weight 30x8 embedding
        text_projection.weight 6x8 linear
        vision_model.embeddings.class_embedding 8 embedding
        vision_model.embeddings.patch_embedding.weight 8x3x4x4 conv2d
        vision_model.pre_layrnorm.weight 8 norm
    """,
    "mamba": """
        backbone.embeddings.weight 30x8 embedding
        backbone.layers.0.mixer.A_log 16x4 asks
        backbone.layers.0.mixer.D 16 vector
        backbone.layers.0.mixer.conv1d.weight 16x1x4 conv1d .bias=16
        backbone.layers.0.mixer.dt_proj.weight 16x2 linear .bias=16
    """,
    "modules of torch": """
        attn.bias_k 1x1x8 bias
        attn.in_proj_weight 24x8 linear attn.in_proj_bias=24
        attn.out_proj.weight 8x8 linear .bias=8
        bilinear.bias 4 bias
        bilinear.weight 4x8x8 asks
        critic.weight 1x8 linear .bias=1
        rnn.weight_hh_l0 24x8 linear rnn.bias_hh_l0=24
        rnn.weight_ih_l0 24x4 linear rnn.bias_ih_l0=24
        wn.conv.weight_g 1x1x3 vector
        wn.conv.weight_v 8x4x3 asks
        0.weight 30x8 asks
        1.bias 5 bias
        1.weight 8x4 asks
    """,
}


def parse(text: str):
    """Arrays, expected verdicts and layers of a model."""
    params, verdicts, found = {}, {}, []
    for line in text.strip().splitlines():
        key, sizes, verdict, *others = line.split()
        module, dot, names = key.rpartition(".")
        for name in names.split(","):
            dtype = jnp.int32 if verdict == "integers" else jnp.float32
            params[module + dot + name] = array(*shape(sizes), dtype=dtype)
            verdicts[module + dot + name] = verdict
        follows = []
        for other in others:
            name, _, size = other.partition("=")
            follows.append(module + name if name == ".bias" else name)
            params[follows[-1]], verdicts[follows[-1]] = array(int(size)), "follows"
        if verdict in KERNELS:
            found.append(Layer(key, axes(KERNELS[verdict]), tuple(follows)))
    return params, verdicts, found


@pytest.mark.parametrize("model", MODELS)
def test_names_of_published_models(model):
    """Every key gets its verdict; what is asked for can be left out."""
    params, verdicts, expected = parse(MODELS[model])
    asks = [key for key, verdict in verdicts.items() if verdict == "asks"]
    if asks:
        message = f"cannot tell how to read {len(asks)} "
        with pytest.raises(ValueError, match=message) as error:
            tb_optax.find_layers(params)
        named = re.findall(r"^ +'(.*?)' of shape", str(error.value), re.MULTILINE)
        assert sorted(named) == sorted(asks)
    found = tb_optax.find_layers(params, axes=dict.fromkeys(asks))
    assert {layer.path: layer for layer in found} == {own.path: own for own in expected}
    readings = read_leaves(leaves_of(params))
    for key, verdict in verdicts.items():
        reading = readings[key]
        assert reading.unclear == (verdict == "asks"), key
        if verdict not in (*KERNELS, "follows", "asks"):
            assert reading.reason == REASONS.get(verdict, verdict), key
    # Every leaf is accounted for.
    owned = {path for layer in found for path in (layer.path, *layer.follows)}
    rows = {row["leaf"]: row for row in tb_optax.describe(params, found)}
    assert rows.keys() == params.keys()
    for key, row in rows.items():
        assert bool(row["layer"]) == (key in owned), key
        assert row["note"], key
        assert bool(row["layer"]) or row["note"] != "follows"


def test_layers_come_in_numeric_order():
    """10 after 9, wherever the number is; whatever the order of the dict."""
    names = [f"model.layers.{i}.fc{j}.weight" for i in range(12) for j in (9, 10)]
    found = tb_optax.find_layers(dict.fromkeys(reversed(names), array(4, 4)))
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
    found = tb_optax.find_layers(params)
    assert found == layers("net.9.weight:oi<.bias net.10.conv.weight:oipp")
    analysis = tb_optax.layer_analysis(found, min_eigenvalues=4)(params)
    assert analysis.eigenvalue_count.tolist() == [8, 36]
    multipliers = analysis.leaf_multipliers(params)
    assert multipliers["net.9.bias"] == multipliers["net.9.weight"]
    assert multipliers["embed.weight"] == 1
    # A file inside a larger tree keeps its keys.
    (nested, _) = tb_optax.find_layers({"model": params})
    assert nested.path == "model/net.9.weight"
    assert nested.follows == ("model/net.9.bias",)


def test_axes_settle_dotted_names():
    params = arrays(
        "mixer.0.A_log 16x4, mixer.0.experts.up_proj 4x8x6, mixer.0.in_proj.weight 16x4"
    )
    given = {"*.A_log": None, "*.experts.*": axes("soi")}
    found = tb_optax.find_layers(params, axes=given)
    assert found == layers("mixer.0.experts.up_proj:soi mixer.0.in_proj.weight:oi")


# A `kernel` of rank 4 is a convolution only with a sign of one.
SIGNS = {
    "the name of its module": {"Conv_0": {"kernel": "3x3x8x6"}},
    "a bias of the last size": {"stem": {"kernel": "3x3x8x6", "bias": "6"}},
    "a bias and no module": {"kernel": "3x3x8x6", "bias": "6"},
    "a sibling": {"a": {"conv1": {"kernel": "3x3x8x6"}, "s": {"kernel": "1x1x8x6"}}},
    "a name in haiku": {"net/~/conv2_d_transpose": {"w": "3x3x8x6"}},
}
NO_SIGNS = {
    "gemma": {"attn": {"qkv_einsum": {"kernel": "3x4x64x16"}}},
    "gemma with norms beside it": {
        "attn": {"qkv_einsum": {"kernel": "3x4x64x16"}, "query_norm": {"scale": "16"}}
    },
    "a root": {"kernel": "3x3x8x6"},
    "an unknown module": {"mix": {"kernel": "3x3x8x6"}},
    "positions that share nothing": {"ConvLocal_0": {"kernel": "5x5x72x4"}},
    "a bias that is another": {"conv": {"kernel": "3x3x8x6", "bias": "3x6"}},
    "several inputs": {"DenseGeneral_0": {"kernel": "5x4x8x6", "bias": "6"}},
    "a sibling of another rank": {
        "mixer": {"conv1d": {"w": "4x1x8"}, "mix": {"kernel": "3x3x8x6"}}
    },
}


@pytest.mark.parametrize("name", [*SIGNS, *NO_SIGNS])
def test_signs_of_a_convolution(name):
    leaves = leaves_of(arrays({**SIGNS, **NO_SIGNS}[name]))
    readings = read_leaves(leaves)
    for reading in (readings[p] for p, leaf in leaves.items() if len(leaf.shape) == 4):
        assert reading.axes == (axes("ppio") if name in SIGNS else None)
        assert reading.unclear == (name in NO_SIGNS)


def test_the_class_of_a_module_is_a_sign():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(8, 6, (3, 3), use_bias=False, rngs=rngs)
            self.mix = nnx.Einsum("abcd,...c->ab...d", (3, 3, 8, 6), rngs=rngs)

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    found = tb_optax.find_layers(model, axes={"mix/kernel": None})
    assert found == layers("stem/kernel:ppio")
    with pytest.raises(ValueError, match="'mix/kernel' of shape"):
        tb_optax.find_layers(model)


def test_complex_leaves_are_called_complex():
    (row,) = tb_optax.describe({"w": array(8, 6, dtype=jnp.complex64)}, [])
    assert row["note"] == "complex"


def test_shapes_alone_never_make_a_convolution():
    """All permutations of one shape under a name without a sign are asked for."""
    for sizes in ("3x3x8x6", "8x6x3x3", "6x8x3x3", "8x3x3x6"):
        with pytest.raises(ValueError, match="without a sign of a convolution"):
            tb_optax.find_layers({"block.0.weight": array(*shape(sizes))})
