"""The four maps from scores to rates, on recorded vectors of scores."""

import golden
import golden_library
import golden_record
import numpy as np
import optax
import pytest
import reference
from golden_deviations import Deviation, assert_as_listed, state_of, where

RECORD = golden_record.Record()
INFO, ARRAYS = golden.read_json("assign"), golden.read_arrays("assign")
CONFIGS, VECTORS = INFO["configs"], INFO["vectors"]
NAMES = tuple(vector["name"] for vector in VECTORS)

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
WITH_NAN = ("with_nan", "nan_first")
SMALL = ("below_one", "wide")
MOVING = (LINEAR | STEP) - SAME_BOUNDS - STOPPED
DEVIATIONS = (
    Deviation("rate", ("random_1",), MOVING, "finite", "others", ONE),
    Deviation("rate", ("all_equal", "zeros"), MOVING, "finite", "others", EQUAL),
    Deviation(
        "rate", ("near_equal",), MOVING, "finite", "others", ROUNDED, ("float32",)
    ),
    Deviation("rate", ("zeros",), SQRT, "nan", "others", EQUAL),
    Deviation("rate", ("zeros",), LOG2, "nan", "others", DOMAIN),
    Deviation("rate", ("empty",), LINEAR, "raises", "others", NOTHING),
    Deviation("rate", ("with_inf", "two_inf"), MOVING, "finite", "others", NO_SCORE),
    Deviation("rate", ("with_inf", "two_inf"), SQRT | LOG2, "nan", "others", NO_SCORE),
    Deviation("rate", ("with_nan",), LINEAR, "nan", "others", NO_SCORE),
    Deviation(
        "rate", ("with_nan", "nan_first"), SQRT | LOG2, "nan", "others", NO_SCORE
    ),
    Deviation("rate", ("nan_first",), LINEAR, "nan", "others", NO_SCORE),
    Deviation(
        "rate",
        WITH_NAN,
        STEP - SAME_BOUNDS - STOPPED,
        "finite",
        "others",
        NO_SCORE,
    ),
    Deviation(
        "rate", ("negative", "all_negative"), SQRT | LOG2, "nan", "others", DOMAIN
    ),
    Deviation(
        "rate", ("below_one", "wide"), LOG2 - STOPPED, "finite", "others", DOMAIN
    ),
)


@pytest.fixture(scope="module", autouse=True)
def print_table():
    yield
    print(RECORD.table("maps"))


def multipliers(scores, config, precision_name):
    """The library's map on a vector, layers without a finite score not tuned."""
    dtype = golden_library.dtype_of(precision_name)
    with golden_library.precision(precision_name):
        return golden_library.mapped(config, scores, np.isfinite(scores), dtype)


@pytest.mark.parametrize("precision_name", golden.PRECISIONS)
def test_rates(precision_name):
    found, failures = {}, []
    tolerance = 1e-9 if precision_name == "x64" else 1e-3
    for vector in VECTORS:
        name = vector["name"]
        scores = ARRAYS[f"scores/{name}"]
        seen = scores.astype(golden_library.dtype_of(precision_name))
        for row, config in enumerate(CONFIGS):
            ours = multipliers(scores, config, precision_name)
            # NaN is for a tuned layer outside the domain; the analysis makes it 1.
            with np.errstate(invalid="ignore"):
                outside = seen < reference.DOMAIN[config["assign_func"]]
            assert np.array_equal(np.isnan(ours), outside)
            ours = np.where(outside, 1, ours)
            expected = reference.multipliers(
                seen,
                config["assign_func"],
                config["lr_min_ratio"],
                config["lr_max_ratio"],
            )
            failures += RECORD.compare(
                "multipliers, to the formulas",
                precision_name,
                np.abs(ours - expected),
                tolerance,
                [f"{name}, configuration {row}"] * len(scores),
            )
            base = config["untuned_lr"]
            published = ARRAYS[f"lr/{name}"][row]
            state = state_of(published, failed=row in vector["failures"])
            deviation = np.abs(base * ours - published)
            if state == "finite" and np.all(deviation <= tolerance * base):
                share = deviation / (base or 1)
                places = [f"{name}, configuration {row}"] * len(scores)
                RECORD.compare("rates", precision_name, share, tolerance, places)
            else:
                found[name, row] = (state, "others")
    assert not failures, "\n".join(failures[:20])
    assert_as_listed(DEVIATIONS, "rate", precision_name, found, RECORD)


def test_cosine():
    """The base rate that the published code gives its epochs is Optax's cosine."""
    for (init, epoch, total), rate in zip(
        ARRAYS["cosine_in"], ARRAYS["cosine_out"], strict=True
    ):
        schedule = optax.cosine_decay_schedule(init, total)
        np.testing.assert_allclose(schedule(epoch), rate, rtol=1e-5, atol=1e-7 * init)
