"""Whole trainings and schedules of the relatives, replayed with the library's parts.

Where the published loop refreshes at other steps than count % interval == 0, or moves
rates in place of multipliers, the test drives the multipliers from the host. `-s`
prints the largest deviations, of which docs/family.md has the table.
"""

import functools
from typing import Any

import family
import golden_record
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family import LINEAR, recorded, third_part

import tb_optax
from tb_optax import Layer, linear, log2, nested, sqrt, standard_sigmoid
from tb_optax.recipes import largest_at_ends

pytestmark = pytest.mark.usefixtures("x64")

RECORD = golden_record.Record("trainings of the relatives")
ENDS = ("*embed*", "*head*")


def check(what, found, published, tolerance, scale=1.0):
    """Compare in units of `scale`."""
    RECORD.compare(what, "x64", np.abs(found - published) / scale, tolerance, what)


# --- models -------------------------------------------------------------------------


def heads(x, count):
    return x.reshape(*x.shape[:-1], count, -1).swapaxes(-2, -3)


def llama_loss(p, ids, info):
    """Mean cross entropy of the next token of TinyLlama."""
    sizes = info["architecture"]

    def rms(x, weight):
        return weight * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    x = p["model.embed_tokens.weight"][ids]
    mask = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
    width = sizes["d"] // sizes["heads"]
    for i in range(sizes["layers"]):
        block = f"model.layers.{i}"

        def linear_map(x, name, block=block):
            return x @ p[f"{block}.{name}.weight"].T

        h = rms(x, p[f"{block}.input_layernorm.weight"])
        q = heads(linear_map(h, "self_attn.q_proj"), sizes["heads"])
        k, v = (
            heads(linear_map(h, f"self_attn.{n}_proj"), sizes["kv"] // width)
            for n in "kv"
        )
        k, v = (jnp.repeat(y, q.shape[1] // y.shape[1], axis=1) for y in (k, v))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(width)
        h = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)) @ v
        h = h.swapaxes(1, 2).reshape(*x.shape)
        x = x + linear_map(h, "self_attn.o_proj")
        h = rms(x, p[f"{block}.post_attention_layernorm.weight"])
        gate = jax.nn.silu(linear_map(h, "mlp.gate_proj"))
        x = x + linear_map(gate * linear_map(h, "mlp.up_proj"), "mlp.down_proj")
    logits = rms(x, p["model.norm.weight"]) @ p["lm_head.weight"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return losses.mean()


def roberta_loss(p, ids, labels, info):
    """Mean cross entropy of a tiny RoBERTa that classifies sequences."""
    sizes = info["model_config"]

    def dense(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + sizes["layer_norm_eps"])
        return p[f"{name}.weight"] * x + p[f"{name}.bias"]

    names = "roberta.embeddings"
    x = p[f"{names}.word_embeddings.weight"][ids]
    positions = p[f"{names}.position_embeddings.weight"][2 : 2 + ids.shape[1]]
    x = norm(
        x + positions + p[f"{names}.token_type_embeddings.weight"][0],
        f"{names}.LayerNorm",
    )
    for i in range(sizes["num_hidden_layers"]):
        block = f"roberta.encoder.layer.{i}"
        q, k, v = (
            heads(dense(x, f"{block}.attention.self.{n}"), sizes["num_attention_heads"])
            for n in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        h = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(x.shape)
        h = dense(h, f"{block}.attention.output.dense")
        x = norm(x + h, f"{block}.attention.output.LayerNorm")
        h = jax.nn.gelu(dense(x, f"{block}.intermediate.dense"), approximate=False)
        x = norm(x + dense(h, f"{block}.output.dense"), f"{block}.output.LayerNorm")
    logits = dense(jnp.tanh(dense(x[:, 0], "classifier.dense")), "classifier.out_proj")
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def initial(arrays, prefix="init/"):
    return {
        name.removeprefix(prefix): jnp.asarray(value, float)
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def train(tx, loss, params, batches, refresh):
    """Losses and final parameters; `refresh(step, params, state)` acts as the host."""

    @jax.jit
    def update(params, state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for step, batch in enumerate(zip(*batches, strict=True)):
        state = refresh(step, params, state)
        params, state, value = update(params, state, *map(jnp.asarray, batch))
        losses.append(float(value))
    return params, losses


def assert_as_recorded(params, losses, arrays):
    check("losses", losses, arrays["loss"], 1e-8)
    for name, value in arrays.items():
        if name.startswith("final/"):
            exact = value * 1e-9 if value.dtype == np.int32 else value
            found = params[name.removeprefix("final/")]
            check("final parameters", found, exact, 1e-8)


def adam_parts(rates):
    rates = jnp.asarray(rates, float)
    return optax.scale_by_adam(), optax.scale_by_learning_rate(lambda t: rates[t])


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_training_with_alpha_decay(optimizer):
    """Coupled, in front of Adam, and decoupled, after it."""
    info, arrays = recorded(f"alpha_decay_train_{optimizer}")
    options = dict(zip(info["arguments"][::2], info["arguments"][1::2], strict=True))
    bounds = (float(options["--wd_min_ratio"]), float(options["--wd_max_ratio"]))
    names = info["layer_names"][1:-1]
    layers = [Layer(f"{name}.weight", LINEAR) for name in names]
    analyze = tb_optax.layer_analysis(layers, assign=linear(*bounds))
    decay = tb_optax.add_balanced_weight_decay(info["base_wd"], analyze, interval=None)
    adam, rate = adam_parts(arrays["lr"])
    parts = (decay, adam) if optimizer == "adam" else (adam, decay)
    place = [info["param_names"].index(layer.path) for layer in layers]

    def refresh(step, params, state):
        if step in info["refresh_before_update"]:
            state = tb_optax.set_multipliers(state, analyze(params))
        found = info["base_wd"] * tb_optax.get_multipliers(state)
        published = arrays["weight_decay"][step, place]
        check("decays of AlphaDecay", found, published, 1e-8, published)
        return state

    loss = functools.partial(llama_loss, info=info)
    batches = [arrays["input_ids"].astype(np.int32)]
    tx = optax.chain(*parts, rate)
    assert_as_recorded(*train(tx, loss, initial(arrays), batches, refresh), arrays)


@pytest.mark.parametrize("name", ["sigmoid", "hybrid"])
def test_a_training_with_model_balancing(name):
    """Scores of step t are first used by update t + 1, on a rate that moves."""
    info, arrays = recorded(f"model_balancing_train_{name}")
    options = family.recorded("model_balancing_roberta64")[0]["map_defaults"]
    options = options | info["options"]
    both = options["hyperparam_to_tune"] == "hybrid"
    layers = family.balanced_layers(info)
    analyses = {}
    for kind in ("lr", "wd"):
        rule = {"temp_balance": options[f"temp_balance_{kind}"]}
        assign, groups = family.map_of_balancing(options | rule, kind)
        fit = tb_optax.fit_median(options["xmin_pos"])
        analyses[kind] = tb_optax.layer_analysis(
            layers, fit=fit, assign=assign, groups=groups
        )
    decays = {path: path in info["decay_parameters"] for path in info["param_names"]}
    decay = tb_optax.add_balanced_weight_decay(
        info["weight_decay"], analyses["wd"], interval=None, mask=decays
    )
    adam, rate = adam_parts(base_rates(info))
    if not both:
        decay = optax.add_decayed_weights(info["weight_decay"], decays)
    balance = tb_optax.scale_by_temp_balance(analyses["lr"], interval=None)
    first = info["warmup_steps"] + 1 if options.get("after_warm") == "True" else 0
    newest = {}

    def refresh(step, params, state):
        if newest and step - 1 >= first:
            if both:
                state = tb_optax.set_multipliers(state, newest["wd"], which=0)
            which = int(both)
            state = tb_optax.set_multipliers(state, newest["lr"], which=which)
        if step in info["refresh_steps"]:
            newest.update({kind: own(params) for kind, own in analyses.items()})
        return state

    loss = functools.partial(roberta_loss, info=info)
    batches = [arrays["input_ids"].astype(np.int32), arrays["labels"].astype(np.int32)]
    tx = optax.chain(adam, decay, balance, rate)
    assert_as_recorded(*train(tx, loss, initial(arrays), batches, refresh), arrays)


def base_rates(info):
    """Linear warm-up and linear decay."""
    steps, warmup = np.arange(info["total_steps"]), info["warmup_steps"]
    down = (info["total_steps"] - steps) / (info["total_steps"] - warmup)
    share = np.where(steps < warmup, steps / max(warmup, 1), down)
    return info["learning_rate"] * share


# --- LLR ----------------------------------------------------------------------------


def map_of_llr(config):
    low, high = config["lr_min_ratio"], config["lr_max_ratio"]
    if not config["alpha_positively_with_lr"]:
        if config["assign_func"] == "tb_sqrt":
            return lambda metric, tuned: jnp.where(
                tuned, (metric**0.5).mean() / metric**0.5, 1
            )
        low, high = high, low
    rule = config["assign_func"].removeprefix("layer_").removeprefix("tb_")
    assign = {
        "linear_map": linear(low, high),
        "sqrt": sqrt(),
        "log2": log2(),
        "sigmoid": standard_sigmoid(),
        "layerwise_sigmoid": standard_sigmoid(),
    }[rule]
    within = config["assign_func"].startswith("layer")
    return nested(None, assign, third_part) if within else assign


class Scheduled:
    """The published schedule of rates, slips at its end included, from multipliers.

    `scheduled(step)` gives rates of the layers at a refresh, before the schedule. The
    last of all rates is that of the other parameters.
    """

    def __init__(self, config, scheduled, groups):
        self.config, self.scheduled = config, scheduled
        self.base = np.full(groups + 1, config["eta"])
        self.position = 0
        self.ramp: Any = None
        self.before: Any = None

    def share(self, step):
        """Linear warm-up, then a cosine to alpha_f; beyond its end it starts again."""
        config = self.config
        if step and step % config["T"] == 0:
            return 1e-7
        step %= config["T"]
        if step < config["warmup"]:
            return step / max(1, config["warmup"])
        part = (step - config["warmup"]) / (config["T"] - config["warmup"])
        least = config["alpha_f"]
        return least + (1 - least) * (1 + np.cos(np.pi * part)) / 2

    def rates(self, step):
        """The rate of each group in a step, counted from 1."""
        config = self.config
        every, length = config["unbalancedlr_every"], config["linear_steps"]
        if self.before is None:
            self.before = self.base * self.share(0)
        if step > config["T"] * config["LLR_ratio"]:
            self.ramp = None
        elif step == 1 or step % every == 0:
            own = self.scheduled(step)
            lands = length if step == 1 else step + length
            target = own * self.share(lands)
            target = np.append(target, target.min())
            steps = length if step == 1 else length + 1
            self.ramp = (step, self.before, target, steps, own)
        elif self.ramp is not None and step % every > min(length, every):
            self.base = np.append(self.ramp[4], config["eta"])
            self.position, self.ramp = step - 1, None
        if self.ramp is not None:
            start, before, target, steps, _ = self.ramp
            rates = before + (target - before) * (step - start + 1) / steps
        else:
            self.position += 1
            rates = self.base * self.share(self.position)
        self.before = rates
        return rates


@pytest.mark.parametrize("name", ["llr_schedule_llama52", "llr_schedule_gqa52"])
def test_schedules_of_llr(name):
    """Scores, scheduled rates, and all rates that follow."""
    info, arrays = recorded(name)
    start, change = initial(arrays, "W0/"), initial(arrays, "D/")
    layers = tuple(Layer(f"{x}.weight", LINEAR) for x in info["layer_names"])
    analyses = [
        tb_optax.layer_analysis(layers, fit=tb_optax.fit_median(p)) for p in (2, 1.5)
    ]
    metric = largest_at_ends(ENDS)

    @jax.jit
    def both(step):
        params = jax.tree.map(lambda w, d: w + (step - 1) * d, start, change)
        return [(a, metric(a)) for a in (analyze(params) for analyze in analyses)]

    at_step = functools.cache(lambda step: jax.device_get(both(step)))
    compared = 0
    for row, over in enumerate(info["configs"]):
        config = info["config_defaults"] | over
        if info["status_f64"][row] != "ok" or config["esd_metric_for_tb"] != "alpha":
            continue
        kept = np.isfinite(arrays[f"{row}/refresh_f64"][0, :, 2])
        names = [x for x, own in zip(info["layer_names"], kept, strict=True) if own]

        def scheduled(step, config=config, kept=kept, names=names):
            _, scores = at_step(step)[config["xmin_pos"] == 1.5]
            rates = family.multipliers(scores[kept], names, map_of_llr(config)).copy()
            if config["embed_lr"] > 0:
                rates[[0, -1]] = config["embed_lr"] / config["eta"]
            return config["eta"] * rates

        # The sum of the published shares has 1e-8 in each term.
        linear_map = "linear" in config["assign_func"]
        kind = "linear maps" if linear_map else "shares"
        tolerance = 1e-9 if linear_map else 2e-8
        for i, step in enumerate(info["runs"][row]["refresh"]):
            published = arrays[f"{row}/refresh_f64"][i, kept]
            _, scores = at_step(step)[config["xmin_pos"] == 1.5]
            if not config["remove_first_layer"]:
                own = published[:, 1]
                check("scores of LLR", scores[kept], own, 1e-9, own)
            own = published[:, 2]
            check(f"targets of LLR, {kind}", scheduled(step), own, tolerance, own)
        rates = arrays.get(f"{row}/lr_f64")
        if rates is not None:
            run = Scheduled(config, scheduled, len(names))
            found = np.stack([run.rates(step + 1) for step in range(len(rates))])
            scale = np.abs(rates) + 1e-12 / tolerance
            check(f"schedules of LLR, {kind}", found, rates, tolerance, scale)
            compared += 1
    assert compared > 10


def test_a_training_with_llr():
    info, arrays = recorded("llr_train_adamw")
    config = info["options"]
    layers = tuple(Layer(f"{x}.weight", LINEAR) for x in info["layer_names"])
    bounds = linear(config["lr_min_ratio"], config["lr_max_ratio"])
    analyze = tb_optax.layer_analysis(
        layers, metric=largest_at_ends(ENDS), assign=bounds
    )
    now = {}
    run = Scheduled(
        config,
        lambda _: config["eta"] * np.asarray(analyze(now["params"]).multipliers),
        len(layers),
    )
    plain = arrays["lr"][:, -1]
    adam, rate = adam_parts(plain)

    def refresh(step, params, state):
        now["params"] = params
        rates = run.rates(step + 1)
        check("rates of LLR", rates, arrays["lr"][step], 1e-8, arrays["lr"][step])
        return tb_optax.set_multipliers(state, rates[:-1] / rates[-1])

    tx = optax.chain(
        adam,
        optax.add_decayed_weights(config["weight_decay"]),
        tb_optax.scale_by_temp_balance(analyze, interval=None),
        rate,
    )
    loss = functools.partial(llama_loss, info=info)
    batches = [arrays["input_ids"].astype(np.int32)]
    assert_as_recorded(*train(tx, loss, initial(arrays), batches, refresh), arrays)
