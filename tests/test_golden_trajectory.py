"""Three recorded trainings replayed as one Optax chain in one compiled loop.

The convolutional net, its loss and its batches are those of the recording; momentum,
weight decay, the cosine staircase and TempBalance come from the chain.
"""

import dataclasses
import functools
import itertools

import golden
import golden_library
import golden_record
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import tb_optax

RECORD = golden_record.Record("trajectories")
NAMES = ("plain", "linear_map", "sqrt_order")
# Held in the other precision by default.
SLOW = tuple((name, "float32") for name in NAMES)
CASES = [
    pytest.param(*case, marks=[pytest.mark.long] if case in SLOW else [])
    for case in itertools.product(NAMES, golden.PRECISIONS)
]

# The recorded float32 and float64 runs of one training differ by up to 3e-4 (a relu
# flip is enough), so that float32 cannot be held tighter; two float32 runs can differ
# by twice that. The recorded float64 run is exact but for rounding.
FLOAT32 = 3e-4
X64 = 1e-8


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recorded training; `runs` holds its arrays by precision."""

    info: dict
    init: dict
    images: np.ndarray
    labels: np.ndarray
    runs: dict

    @property
    def options(self):
        """Options of TempBalance, None for plain training."""
        return self.info["tb_options"]

    def layers(self):
        """The tuned layers, and their columns in the recorded tables."""
        names = self.info["layer_names"]
        norms = self.info["bn_map"] if self.options else {}
        follow = reference.followers(names, self.info["param_names"], norms)
        layers = [
            tb_optax.Layer(
                golden.kernel_name(name),
                golden.LINEAR if name == "fc" else golden.CONV,
                follow[name],
            )
            for name in names
        ]
        options = self.options or {}
        first = int(options.get("remove_first_layer", True))
        last = int(options.get("remove_last_layer", True))
        kept = slice(first, len(names) - last)
        return layers[kept], kept


@functools.cache
def recording(name):
    info = golden.read_json(f"trajectory_{name}")
    # The two trainings of the same net see the same images.
    seen = golden.read_arrays(f"trajectory_{name.replace('plain', 'linear_map')}")
    arrays = golden.read_arrays(f"trajectory_{name}").items()
    runs = {
        precision_name: {k.removeprefix(f): v for k, v in arrays if k.startswith(f)}
        for f, precision_name in (("f32/", "float32"), ("f64/", "x64"))
    }
    for param in info["param_names"]:
        runs["x64"][f"final/{param}"] = 1e-9 * runs["x64"][f"final/{param}"]
    return Recording(
        info=info,
        init=golden.initial_parameters(info),
        images=seen["images"],
        labels=seen["labels"],
        runs=runs,
    )


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


def analysis_of(recording):
    layers, _ = recording.layers()
    options = recording.options
    if options is None:
        return tb_optax.layer_analysis(layers)
    return tb_optax.layer_analysis(
        layers,
        fit=golden_library.fit_of(options),
        assign=golden_library.map_of(options),
        min_eigenvalues=options["eigs_thresh"],
        eigenvalue_floor=golden.floor_of(options),
        conv_norm=options["conv_norm"],
    )


@functools.cache
def replay(name, precision_name):
    """The training by the library: losses, states before updates, final parameters."""
    run = recording(name)
    info = run.info
    per_epoch, epochs = info["batches_per_epoch"], info["epochs"]
    analyze = analysis_of(run)

    def schedule(count):
        return info["lr0"] * 0.5 * (1 + jnp.cos(jnp.pi * (count // per_epoch) / epochs))

    optimizer = info["optimizer"]
    tx = optax.chain(
        optax.add_decayed_weights(optimizer["weight_decay"]),
        optax.sgd(schedule, momentum=optimizer["momentum"]),
        tb_optax.scale_by_temp_balance(
            analyze, interval=per_epoch if info["use_tb"] else None
        ),
    )
    dtype = golden.DTYPES[precision_name]
    with golden_library.precision(precision_name):
        params = {name: jnp.asarray(value, dtype) for name, value in run.init.items()}
        images, labels = jnp.asarray(run.images, dtype), jnp.asarray(run.labels)

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

        final, (loss, multipliers, alpha), rates = train(params)
        last = analyze(final)
        leaves = [
            dataclasses.replace(last, multipliers=row).leaf_multipliers(params)
            for row in multipliers[::per_epoch]
        ]
        return jax.device_get((final, loss, alpha, rates, leaves, last))


@pytest.mark.parametrize(("name", "precision_name"), CASES)
def test_a_replay_is_the_recorded_training(name, precision_name):
    """Losses, final parameters, rates of all parameters, alphas of all refreshes.

    The final parameters of the recorded float32 run lie so close to those of the
    float64 one that they say nothing more.
    """
    run = recording(name)
    final, loss, alpha, rates, leaves, last = replay(name, precision_name)
    # Name of the run, its arrays, and the tolerance.
    targets = [
        ("float64", run.runs["x64"], X64 if precision_name == "x64" else FLOAT32)
    ]
    if precision_name == "float32":
        targets.append(("float32", run.runs["float32"], 2 * FLOAT32))

    def check(what, target, actual, expected):
        assert np.shape(actual) == expected.shape
        deviation = np.abs(np.asarray(actual, np.float64) - expected)
        what = f"{what}, to {target[0]}"
        RECORD.compare(what, precision_name, deviation, target[2], name)

    for target in targets:
        recorded = target[1]
        check("loss", target, loss, recorded["loss"])
        for epoch, (rate, leaf) in enumerate(zip(rates, leaves, strict=True)):
            actual = [leaf[param] * rate for param in run.info["param_names"]]
            base = run.info["lr0"]
            expected = recorded["lr"][epoch] / base
            check("rates over lr0", target, np.asarray(actual) / base, expected)
        assert recorded["untuned_lr"][-1] == 0
        if run.options:
            per_epoch = run.info["batches_per_epoch"]
            refreshed = alpha[::per_epoch]
            assert np.array_equal(alpha, np.repeat(refreshed, per_epoch, axis=0))
            expected = recorded["alpha"][:, run.layers()[1]]
            actual = np.vstack([refreshed, last.alpha]) / expected
            check("alpha, relative", target, actual, np.ones_like(expected))
    assert run.info["f32_minus_f64"]["final_param_max_abs"] <= FLOAT32
    for param in run.info["param_names"]:
        expected = targets[0][1][f"final/{param}"]
        check("final parameters", targets[0], final[param], expected)


def test_balance_is_not_plain_training():
    plain, balanced = (recording(name).runs["x64"] for name in NAMES[:2])
    assert np.abs(plain["loss"] - balanced["loss"]).max() > 100 * FLOAT32
