"""Three recorded trainings replayed as one Optax chain in one compiled loop.

The convolutional net, its loss and its batches are those of the recording; momentum,
weight decay, the cosine staircase and TempBalance come from the chain.
"""

import dataclasses
import functools

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

RECORD = golden_record.Record()
NAMES = ("plain", "linear_map", "sqrt_order")
# Held in the other precision by default.
SLOW = (("plain", "float32"), ("sqrt_order", "float32"))
CASES = [
    pytest.param(
        name,
        precision_name,
        marks=[pytest.mark.long] if (name, precision_name) in SLOW else [],
    )
    for name in NAMES
    for precision_name in golden.PRECISIONS
]
every_training = pytest.mark.parametrize(("name", "precision_name"), CASES)

# The recorded float32 and float64 runs of one training differ by up to 3e-4 (a relu
# flip is enough), so that float32 cannot be held tighter; two float32 runs can differ
# by twice that. The recorded float64 run is exact but for rounding.
FLOAT32 = 3e-4
X64 = 1e-8


@pytest.fixture(scope="module", autouse=True)
def print_table():
    yield
    print(RECORD.table("trajectories"))


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
        options = self.options or {
            "remove_first_layer": True,
            "remove_last_layer": True,
        }
        kept = slice(
            int(options["remove_first_layer"]),
            len(names) - int(options["remove_last_layer"]),
        )
        return layers[kept], kept


@functools.cache
def recording(name):
    info = golden.read_json(f"trajectory_{name}")
    # The two trainings of the same net see the same images.
    seen = golden.read_arrays(f"trajectory_{name.replace('plain', 'linear_map')}")
    arrays = golden.read_arrays(f"trajectory_{name}")
    runs = {}
    for file, precision_name in (("f32", "float32"), ("f64", "x64")):
        runs[precision_name] = {
            key.removeprefix(f"{file}/"): value
            for key, value in arrays.items()
            if key.startswith(file)
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
    dtype = golden_library.dtype_of(precision_name)
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


def check(what, precision_name, actual, expected, tolerance, where):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    assert actual.shape == expected.shape
    deviation = np.abs(actual - expected).ravel()
    beyond = RECORD.compare(
        what, precision_name, deviation, tolerance, [where] * deviation.size
    )
    assert not beyond, "\n".join(beyond[:20])


def targets(name, precision_name):
    """What a replay is held to: recorded run and tolerance."""
    runs = recording(name).runs
    if precision_name == "x64":
        return [("float64", runs["x64"], X64)]
    return [
        ("float64", runs["x64"], FLOAT32),
        ("float32", runs["float32"], 2 * FLOAT32),
    ]


@every_training
def test_loss_of_every_step(name, precision_name):
    _, loss, *_ = replay(name, precision_name)
    for target, run, tolerance in targets(name, precision_name):
        what = f"loss, to {target}"
        check(what, precision_name, loss, run["loss"], tolerance, name)


@every_training
def test_final_parameters(name, precision_name):
    """The recorded float32 ones lie so close to these that they say nothing more."""
    final, *_ = replay(name, precision_name)
    target, run, tolerance = targets(name, precision_name)[0]
    assert recording(name).info["f32_minus_f64"]["final_param_max_abs"] <= FLOAT32
    for param in recording(name).info["param_names"]:
        what = f"final parameters, to {target}"
        expected = run[f"final/{param}"]
        where = f"{name} {param}"
        check(what, precision_name, final[param], expected, tolerance, where)


@every_training
def test_rate_of_every_parameter_in_every_epoch(name, precision_name):
    *_, rates, leaves, _ = replay(name, precision_name)
    base = recording(name).info["lr0"]
    for target, run, tolerance in targets(name, precision_name):
        for epoch, (rate, leaf) in enumerate(zip(rates, leaves, strict=True)):
            actual = [
                leaf[param] * rate for param in recording(name).info["param_names"]
            ]
            what = f"rates over lr0, to {target}"
            expected = run["lr"][epoch] / base
            actual = np.asarray(actual) / base
            check(what, precision_name, actual, expected, tolerance, f"{name} {epoch}")
        assert run["untuned_lr"][-1] == 0


@pytest.mark.parametrize(("name", "precision_name"), CASES[len(golden.PRECISIONS) :])
def test_alpha_of_every_refresh(name, precision_name):
    _, _, alpha, _, _, last = replay(name, precision_name)
    per_epoch = recording(name).info["batches_per_epoch"]
    assert np.array_equal(alpha, np.repeat(alpha[::per_epoch], per_epoch, axis=0))
    _, kept = recording(name).layers()
    for target, run, tolerance in targets(name, precision_name):
        expected = run["alpha"][:, kept]
        actual = np.vstack([alpha[::per_epoch], last.alpha])
        what = f"alpha, relative, to {target}"
        actual, expected = actual / expected, np.ones_like(expected)
        check(what, precision_name, actual, expected, tolerance, name)


def test_balance_is_not_plain_training():
    plain, balanced = (recording(name).runs["x64"] for name in NAMES[:2])
    assert np.abs(plain["loss"] - balanced["loss"]).max() > 100 * FLOAT32
