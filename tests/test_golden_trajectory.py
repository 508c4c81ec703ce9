"""Three recorded trainings replayed as one Optax chain in one compiled loop.

The convolutional net, its loss and its batches are those of the recording; momentum,
weight decay, the cosine staircase and TempBalance come from the chain.
"""

import dataclasses
import functools

import golden
import golden_library
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import tb_optax

NAMES = ("plain", "linear_map", "sqrt_order")

# The recorded float32 and float64 runs of one training differ by up to 3e-4 (a relu
# flip is enough), so that float32 cannot be held tighter; two float32 runs can differ
# by twice that. The recorded float64 run is exact but for rounding.
FLOAT32 = 3e-4
X64 = 1e-8
TARGETS = {
    "float32": [("f64", FLOAT32), ("f32", 2 * FLOAT32)],
    "x64": [("f64", X64)],
}


@functools.cache
def recorded(name):
    """The JSON file of a training, and its arrays."""
    info, arrays = golden.read_json(f"trajectory_{name}"), {}
    # The two trainings of the same net start alike and see the same images.
    if name == "plain":
        other = golden.read_arrays("trajectory_linear_map")
        shared = ("init", "images", "lab")
        arrays = {k: v for k, v in other.items() if k.startswith(shared)}
    arrays |= golden.read_arrays(f"trajectory_{name}")
    for param in info["param_names"]:
        float32 = arrays[f"f32/final/{param}"].astype(np.float64)
        steps = arrays[f"f64/final/{param}_difference"]
        arrays[f"f64/final/{param}"] = float32 + 1e-10 * steps
    return info, arrays


def tuned_layers(info):
    """The tuned layers, and their columns in the recorded tables."""
    names, options = info["layer_names"], info["tb_options"]
    norms = info["bn_map"] if options else {}
    follow = reference.followers(names, info["param_names"], norms)
    layers = [
        tb_optax.Layer(
            golden.kernel_name(name),
            golden.LINEAR if name == "fc" else golden.CONV,
            follow[name],
        )
        for name in names
    ]
    ends = ("remove_first_layer", "remove_last_layer")
    first, last = (int(options[end]) if options else 1 for end in ends)
    kept = slice(first, len(names) - last)
    return layers[kept], kept


def loss_of(params, architecture, images, labels):
    """Mean cross entropy of conv, batch norm, relu blocks, a mean and a linear head."""
    x = images
    for block in architecture["blocks"]:
        padding, stride = block["padding"], block["stride"]
        x = jax.lax.conv_general_dilated(
            x,
            params[f"{block['conv']}.weight"],
            window_strides=(stride, stride),
            padding=[(padding, padding)] * 2,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            precision=jax.lax.Precision.HIGHEST,
        )
        if block["bias"]:
            x = x + params[f"{block['conv']}.bias"][:, None, None]
        mean = x.mean(axis=(0, 2, 3), keepdims=True)
        variance = x.var(axis=(0, 2, 3), keepdims=True)
        x = (x - mean) / jnp.sqrt(variance + architecture["bn_eps"])
        x = x * params[f"{block['bn']}.weight"][:, None, None]
        x = jax.nn.relu(x + params[f"{block['bn']}.bias"][:, None, None])
    logits = x.mean(axis=(2, 3)) @ params["fc.weight"].T + params["fc.bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def replay(name, precision_name):
    """Train by the library, and return what is recorded, by the same names."""
    info, arrays = recorded(name)
    per_epoch, epochs = info["batches_per_epoch"], info["epochs"]
    layers, _ = tuned_layers(info)
    options = info["tb_options"]
    analyze = tb_optax.layer_analysis(layers)
    if options:
        analyze = golden_library.analysis_of(layers, options)

    def schedule(count):
        return info["lr0"] * 0.5 * (1 + jnp.cos(jnp.pi * (count // per_epoch) / epochs))

    optimizer = info["optimizer"]
    interval = per_epoch if info["use_tb"] else None
    tx = optax.chain(
        optax.add_decayed_weights(optimizer["weight_decay"]),
        optax.sgd(schedule, momentum=optimizer["momentum"]),
        tb_optax.scale_by_temp_balance(analyze, interval=interval),
    )
    dtype = golden_library.dtype_of(precision_name)
    names = info["param_names"]
    with golden_library.precision(precision_name):
        start = {param: jnp.asarray(arrays[f"init/{param}"], dtype) for param in names}
        images = jnp.asarray(arrays["images"], dtype)
        labels = jnp.asarray(arrays["labels"])

        def step(carry, batch):
            params, state = carry
            loss, gradient = jax.value_and_grad(loss_of)(
                params, info["architecture"], images[batch], labels[batch]
            )
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            balance = tb_optax.get_state(state)
            return (params, state), (loss, balance.multipliers, balance.alpha)

        @jax.jit
        def train(params):
            batches = jnp.tile(jnp.arange(per_epoch), epochs)
            carry, rows = jax.lax.scan(step, (params, tx.init(params)), batches)
            return carry[0], rows, jax.vmap(schedule)(jnp.arange(0, 30, per_epoch))

        final, (loss, multipliers, alpha), rates = train(start)
        assert np.array_equal(alpha, np.repeat(alpha[::per_epoch], per_epoch, axis=0))
        last = analyze(final)
        leaves = [
            dataclasses.replace(last, multipliers=row).leaf_multipliers(start)
            for row in multipliers[::per_epoch]
        ]
        found = {f"final/{param}": final[param] for param in names}
        found |= {
            "loss": loss,
            "alpha": np.vstack([alpha[::per_epoch], last.alpha]),
            "lr": [
                [leaf[param] * rate for param in names]
                for leaf, rate in zip(leaves, rates, strict=True)
            ],
        }
        return {what: np.asarray(value) for what, value in found.items()}


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_rate_alpha_and_final_parameter(name, precision_name):
    info, arrays = recorded(name)
    found, failures = replay(name, precision_name), []
    _, kept = tuned_layers(info)
    for run, tolerance in TARGETS[precision_name]:
        for what, actual in found.items():
            if what == "alpha" and not info["use_tb"]:
                continue
            expected = arrays[f"{run}/{what}"]
            scale = 1.0
            if what == "alpha":
                expected = scale = expected[:, kept]
            if what == "lr":
                # The last one is of the epoch after the last.
                expected, scale = expected[: len(actual)], info["lr0"]
            assert actual.shape == expected.shape
            deviation = np.abs(actual - expected) / scale
            failures += golden.beyond(what, f"{name}, {run}", deviation, tolerance)
        assert arrays[f"{run}/untuned_lr"][-1] == 0
    assert not failures, "\n".join(failures[:20])


def test_balance_is_not_plain_training():
    plain, balanced = (recorded(name)[1]["f64/loss"] for name in NAMES[:2])
    assert np.abs(plain - balanced).max() > 100 * FLOAT32
