"""The four maps from scores to rates, on recorded vectors of scores."""

import itertools

import golden
import golden_library
import golden_record
import numpy as np
import optax
import pytest
import reference
from golden_deviations import Deviation, assert_as_listed, state_of, where

RECORD = golden_record.Record("maps")
INFO, ARRAYS = golden.read_json("assign"), golden.read_arrays("assign")
CONFIGS, VECTORS = INFO["configs"], INFO["vectors"]

LINEAR = where(CONFIGS, assign_func="tb_linear_map")
SQRT = where(CONFIGS, assign_func="tb_sqrt")
LOG2 = where(CONFIGS, assign_func="tb_log2")
STEP = where(CONFIGS, assign_func="tb_step")
SAME_BOUNDS = where(CONFIGS, lr_min_ratio=1.0, lr_max_ratio=1.0)
STOPPED = where(CONFIGS, untuned_lr=0.0)

ONE = "one layer has nothing to be balanced against: 1, not a bound"
EQUAL = "equal scores give 1, not a bound or ranks in an order of chance"
ROUNDED = "scores that float32 cannot tell apart are equal"
NO_SCORE = "a layer without a finite score is left alone, and no one else's affair"
DOMAIN = "a score outside the map's domain: its layer is left alone"
NOTHING = "nothing to balance"

# "others": the layers with a score inside the map's domain are balanced among
# themselves, or all are untouched if those are fewer than two.  Rates of 0 are left
# out: there published and ours agree unless the former is not a number.
WITH_NAN, WITH_INF = ("with_nan", "nan_first"), ("with_inf", "two_inf")
MOVING = (LINEAR | STEP) - SAME_BOUNDS - STOPPED
FLOAT32 = ("float32",)
DEVIATIONS = [
    Deviation("rate", cases, configs, published, "others", reason, *precisions)
    for cases, configs, published, reason, *precisions in (
        (("random_1",), MOVING, "finite", ONE),
        (("all_equal", "zeros"), MOVING, "finite", EQUAL),
        (("near_equal",), MOVING, "finite", ROUNDED, FLOAT32),
        (("zeros",), SQRT, "nan", EQUAL),
        (("zeros",), LOG2, "nan", DOMAIN),
        (("empty",), LINEAR, "raises", NOTHING),
        (WITH_INF, MOVING, "finite", NO_SCORE),
        (WITH_INF, SQRT | LOG2, "nan", NO_SCORE),
        (WITH_NAN, LINEAR | SQRT | LOG2, "nan", NO_SCORE),
        (WITH_NAN, STEP - SAME_BOUNDS - STOPPED, "finite", NO_SCORE),
        (("negative", "all_negative"), SQRT | LOG2, "nan", DOMAIN),
        (("below_one", "wide"), LOG2 - STOPPED, "finite", DOMAIN),
    )
]


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
def test_rates(precision_name):
    """Layers without a finite score are not tuned."""
    found = {}
    tolerance = 1e-9 if precision_name == "x64" else 1e-3
    dtype = golden.DTYPES[precision_name]
    for vector, (row, config) in itertools.product(VECTORS, enumerate(CONFIGS)):
        name = vector["name"]
        where = f"{name}, configuration {row}"
        scores = ARRAYS[f"scores/{name}"]
        seen, tuned = scores.astype(dtype), np.isfinite(scores)
        with golden_library.precision(precision_name):
            ours = golden_library.mapped(config, scores, tuned, dtype)
        # NaN is for a tuned layer outside the domain; the analysis makes it 1.
        with np.errstate(invalid="ignore"):
            outside = seen < reference.DOMAIN[config["assign_func"]]
        assert np.array_equal(np.isnan(ours), outside)
        ours = np.where(outside, 1, ours)
        bounds = config["lr_min_ratio"], config["lr_max_ratio"]
        expected = reference.multipliers(seen, config["assign_func"], *bounds)
        deviation = np.abs(ours - expected)
        what = "multipliers, to the formulas"
        RECORD.compare(what, precision_name, deviation, tolerance, where)
        base = config["untuned_lr"]
        published = ARRAYS[f"lr/{name}"][row]
        state = state_of(published, failed=row in vector["failures"])
        deviation = np.abs(base * ours - published)
        if state == "finite" and np.all(deviation <= tolerance * base):
            share = deviation / (base or 1)
            RECORD.compare("rates", precision_name, share, tolerance, where)
        else:
            found[name, row] = (state, "others")
    assert_as_listed(DEVIATIONS, "rate", precision_name, found, RECORD)


def test_cosine():
    """The base rate that the published code gives its epochs is Optax's cosine."""
    for (init, epoch, total), rate in zip(
        ARRAYS["cosine_in"], ARRAYS["cosine_out"], strict=True
    ):
        schedule = optax.cosine_decay_schedule(init, total)
        np.testing.assert_allclose(schedule(epoch), rate, rtol=1e-5, atol=1e-7 * init)
