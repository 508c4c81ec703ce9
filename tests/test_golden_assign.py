"""The four maps from scores to rates, on recorded vectors of scores.

`data/deviations_assign.json` lists where the two disagree. There "others" says that the
layers with a score inside the map's domain are balanced among themselves, or that all
are untouched if those are fewer than two. Rates of 0 are left out: there published and
ours agree unless the former is not a number.
"""

import golden
import golden_library
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

INFO, ARRAYS = golden.read_json("assign"), golden.read_arrays("assign")


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
def test_rates(precision_name):
    found, failures = {}, []
    tolerance = 1e-9 if precision_name == "x64" else 1e-3
    for vector in INFO["vectors"]:
        name = vector["name"]
        seen = ARRAYS[f"scores/{name}"].astype(golden_library.dtype_of(precision_name))
        tuned = np.isfinite(seen)
        for row, config in enumerate(INFO["configs"]):
            with golden_library.precision(precision_name):
                scores = jnp.asarray(np.where(tuned, seen, 1))
                assign = golden_library.map_of(config)
                ours = np.asarray(assign(scores, jnp.asarray(tuned)))
            kind, low = config["assign_func"], config["lr_min_ratio"]
            # NaN is for a tuned layer outside the domain; the analysis makes it 1.
            with np.errstate(invalid="ignore"):
                outside = seen < reference.DOMAIN[kind]
            assert np.array_equal(np.isnan(ours), outside)
            ours = np.where(outside, 1, ours)
            formula = reference.multipliers(seen, kind, low, config["lr_max_ratio"])
            deviation, place = np.abs(ours - formula), f"{name}, configuration {row}"
            failures += golden.beyond("multipliers", place, deviation, tolerance)
            base, published = config["untuned_lr"], ARRAYS[f"lr/{name}"][row]
            state = golden.state_of(published, failed=row in vector["failures"])
            close = np.all(np.abs(base * ours - published) <= tolerance * base)
            if state != "finite" or not close:
                found[name, row] = (state, "others")
    assert not failures, "\n".join(failures[:20])
    table = golden.deviations("assign")
    golden.assert_as_listed(table, "rate", precision_name, found)


def test_cosine():
    """The base rate that the published code gives its epochs is Optax's cosine."""
    for (init, epoch, total), rate in zip(
        ARRAYS["cosine_in"], ARRAYS["cosine_out"], strict=True
    ):
        schedule = optax.cosine_decay_schedule(init, total)
        np.testing.assert_allclose(schedule(epoch), rate, rtol=1e-5, atol=1e-7 * init)
