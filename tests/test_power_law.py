"""Power-law fits against closed forms, brute force and their own invariances."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spectra
from hypothesis import given
from hypothesis import strategies as st
from spectra import eps_of

from tb_optax import fit_median, fit_min_ks, fit_peak


@functools.cache
def jitted(fit):
    return jax.jit(fit)


# Rows of every size go into tables of one shape, so that a fit compiles once.
ROWS, WIDTH = 32, 144


def padded(rows, dtype=np.float64, shape=(ROWS, WIDTH), filler=-np.inf):
    """Rows of ascending logarithms as one table, `filler` and invalid first.

    Rows without any eigenvalue follow them.
    """
    table, valid = np.full(shape, filler, dtype), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        table[i, shape[1] - len(row) :] = row
        valid[i, shape[1] - len(row) :] = True
    return jnp.asarray(table), jnp.asarray(valid)


class Law(NamedTuple):
    """The columns of a `PowerLaw` as NumPy arrays."""

    alpha: np.ndarray
    xmin: np.ndarray
    ks_distance: np.ndarray
    tail_size: np.ndarray


def fit_rows(fit, rows, dtype=np.float64, **padding) -> Law:
    """The law of every row, fitted in one table, as NumPy columns."""
    law = jitted(fit)(*padded(rows, dtype, **padding))
    assert law.alpha.dtype == dtype
    return Law(*(np.asarray(column)[: len(rows)] for column in law))


def random_rows(seed, sizes, scales=(1.0,)) -> list[Any]:
    """Logarithms of heavy-tailed spectra with a peak inside, float32 numbers."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, size in enumerate(sizes):
        logs = np.sort(rng.normal(size=size) + rng.exponential(size=size))
        rows.append(np.float32(logs + math.log(scales[i % len(scales)])))
    return [row.astype(np.float64) for row in rows]


def hill_tolerance(logs, size, dtype):
    """Worst-case relative rounding error of alpha - 1, fitted to these logarithms.

    Each excess ln(λ_j / xmin) carries one rounding of at most eps/2 of itself; the
    sum of n terms at most n·eps of itself, in whatever order; the quotient one more.
    A fit that takes differences of cumulative sums loses, on top, n·eps times the
    ratio of the range of all logarithms to the mean excess.
    """
    top = np.asarray(logs)[-size:]
    mean = np.mean(top - top[0]) or 1
    span = np.ptp(np.asarray(logs)[np.isfinite(logs)])
    return (size + 4) * eps_of(dtype) * (1 + span / mean)


# --- closed forms -------------------------------------------------------------------

PARETO_SIZES = (16, 99, 1000, 4096)


@pytest.mark.parametrize("include_threshold", [True, False])
@pytest.mark.parametrize("position", [1.25, 2, 3.7])
@pytest.mark.usefixtures("x64")
def test_pareto_quantiles_give_the_closed_form(position, include_threshold):
    alphas = (1.2, 2.0, 3.5, 10.0)
    cases = [(alpha, size) for alpha in alphas for size in PARETO_SIZES]
    rows = [np.log(spectra.pareto_quantiles(*case, xmin=7.0)) for case in cases]
    fit = fit_median(position, include_threshold)
    law = fit_rows(fit, rows, shape=(len(cases), max(PARETO_SIZES)))
    for i, (alpha, size) in enumerate(cases):
        tail = size - math.floor(size / position)
        first = size - tail - (not include_threshold)
        exact = spectra.hill_of_pareto_quantiles(
            alpha, tail, include_threshold=include_threshold
        )
        # The logarithms go through a power and back: eps/2 of ln λ + ln 7 each.
        mean = np.mean(rows[i][-tail:] - rows[i][first])
        given = eps_of(np.float64) * (1 + math.log(7.0) + np.ptp(rows[i])) / mean
        tolerance = hill_tolerance(rows[i], tail, np.float64) + given
        assert law.alpha[i] - 1 == pytest.approx(exact - 1, rel=tolerance)
        assert law.tail_size[i] == tail
        assert math.log(law.xmin[i]) == pytest.approx(rows[i][first], abs=1e-14)


@pytest.mark.usefixtures("x64")
def test_small_tails_by_hand():
    """Tails of logarithms 0, 1, 3, worked with a pencil; position 2."""
    rows = [[0.0], [0.0, 2.0], [0.0, 1.0, 3.0], [0.0, 1.0, 2.0, 4.0]]
    law = fit_rows(fit_median(), rows)
    # 1 + 1/0, 1 + 1/0, 1 + 2/(0 + 2), 1 + 2/(0 + 2)
    np.testing.assert_array_equal(law.alpha, [np.inf, np.inf, 2.0, 2.0])
    np.testing.assert_array_equal(law.tail_size, [1, 1, 2, 2])
    np.testing.assert_allclose(law.xmin, np.exp([0.0, 2.0, 1.0, 2.0]), rtol=1e-15)
    # m = 0: |1 - 1 - 0|; m = 1: |1 - exp(-2) - 1/2|.
    distances = [0, 0, 0.5 - math.exp(-2), 0.5 - math.exp(-2)]
    np.testing.assert_allclose(law.ks_distance, distances, rtol=1e-14)

    law = fit_rows(fit_median(include_threshold=False), rows)
    # No λ below the only one; 1 + 1/2; 1 + 2/(1 + 3); 1 + 2/(1 + 3)
    np.testing.assert_array_equal(law.alpha, [0.0, 1.5, 1.5, 1.5])
    np.testing.assert_array_equal(law.tail_size, [0, 1, 2, 2])
    np.testing.assert_allclose(law.xmin, [0, 1, 1, math.e], rtol=1e-15)

    law = fit_rows(fit_min_ks(), rows)
    # With x = (alpha - 1)·ln(λ/xmin), D = max |1 - e^-x - m/n|. One λ has no tail. Two:
    # x = 0, 2. Three: x = 0, 3/4, 9/4, better than its upper two, which are as any two.
    # Four: x = 0, 4/7, 8/7, 16/7, D at m = 1; its upper three are the three before.
    np.testing.assert_array_equal(law.tail_size, [0, 2, 3, 4])
    np.testing.assert_allclose(law.alpha, [0, 2, 1.75, 1 + 4 / 7], rtol=1e-15)
    expected = [
        0.5 - math.exp(-2),
        1 / 3 - math.exp(-9 / 4),
        3 / 4 - math.exp(-4 / 7),
    ]
    np.testing.assert_allclose(law.ks_distance[1:], expected, rtol=1e-14)


@pytest.mark.parametrize("position", [1.0001, 1.1, 2, 10 / 3, 49.0, 1e9])
def test_tail_starts_at_the_floor_of_n_over_position(position):
    """33 / 1.1 is just below 30 in float64 and 30 in float32: floor decides."""
    sizes = range(1, 401)
    rows = [np.arange(size) for size in sizes]
    law = fit_rows(fit_median(position), rows, np.float32, shape=(400, 400))
    expected = [size - math.floor(size / position) for size in sizes]
    np.testing.assert_array_equal(law.tail_size, expected)
    if position == 1.1:
        rounded = np.floor(np.float32(33) / np.float32(1.1))
        assert expected[32] != 33 - rounded


# --- brute force --------------------------------------------------------------------


def brute_candidates(logs, window):
    """Alpha and KS distance of every tail in the window, by plain loops."""
    found = {}
    for i in range(len(logs) - 1):
        if not (window[i] and math.isfinite(logs[i])):
            continue
        tail = [value - logs[i] for value in logs[i:]]
        total, n = math.fsum(tail), len(tail)
        alpha = 1 + n / total if total > 0 else math.inf
        distance = 0.0
        for m, excess in enumerate(tail):
            power = math.exp(-(alpha - 1) * excess) if excess > 0 else 1.0
            distance = max(distance, abs(1 - power - m / n))
        found[i] = (alpha, distance if alpha > 1 else 1.0)
    return found


def brute_window(logs, bins, published):
    """The window of the peak fit, its histogram filled value by value."""
    exponents = [value / math.log(10) for value in logs]
    low, high = exponents[0], exponents[-1]
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = [low + (high - low) * k / bins for k in range(bins + 1)]
    counts = [0] * bins
    for value in exponents:
        below = [k for k in range(bins) if edges[k] <= value]
        counts[below[-1]] += 1
    peak = 10 ** edges[counts.index(max(counts))]
    lower = math.log10(0.95 * peak) if published else 0.95 * peak
    return [lower <= math.exp(value) <= 1.5 * peak for value in logs]


def check_against_brute_force(law, rows, windows, dtype):
    """The fit must be one of the best candidates, and report it right."""
    several = 0
    for i, (logs, window) in enumerate(zip(rows, windows, strict=True)):
        candidates = brute_candidates(logs, window)
        if not candidates:
            assert law.alpha[i] == 0
            assert law.tail_size[i] == 0
            continue
        best = min(distance for _, distance in candidates.values())
        first = len(logs) - int(law.tail_size[i])
        alpha, distance = candidates[first]
        # d(distance)/d(alpha - 1) = excess·(λ/xmin)^(1-alpha) <= 1/(e·(alpha - 1)),
        # so that D moves by at most the relative error of alpha - 1 over e.
        relative = hill_tolerance(logs, len(logs) - first, dtype)
        assert distance <= best + 2 * relative + 4 * eps_of(dtype)
        assert law.alpha[i] - 1 == pytest.approx(alpha - 1, rel=relative)
        assert law.ks_distance[i] == pytest.approx(
            distance, abs=relative + 4 * eps_of(dtype)
        )
        assert math.log(law.xmin[i]) == pytest.approx(
            logs[first], abs=2 * eps_of(dtype) * (1 + abs(logs[first]))
        )
        several += len(candidates) > 1
    assert several >= len(rows) // 2


BRUTE_SIZES = (2, 3, 5, 17, 64, 65, 130)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.usefixtures("x64")
def test_min_ks_is_the_best_of_all_tails(dtype):
    rows = random_rows(0, BRUTE_SIZES * 2)
    law = fit_rows(fit_min_ks(), rows, dtype)
    everything = [[True] * len(row) for row in rows]
    check_against_brute_force(law, rows, everything, dtype)


@pytest.mark.parametrize("bins", [100, 7])
@pytest.mark.parametrize("published", [True, False])
@pytest.mark.usefixtures("x64")
def test_peak_is_the_best_tail_of_its_window(published, bins):
    rows = random_rows(1, BRUTE_SIZES[2:] * 4, scales=(1.0, 1e-3, 1e3, 30.0))
    law = fit_rows(fit_peak(bins, published), rows)
    windows = [brute_window(row, bins, published) for row in rows]
    check_against_brute_force(law, rows, windows, np.float64)
    # The window is a true restriction: some of the best tails of all lie outside.
    anywhere = fit_rows(fit_min_ks(), rows)
    assert (anywhere.tail_size != law.tail_size).any()


# --- ties, zeros, nothing at all ----------------------------------------------------

ALL_FITS = (
    fit_median(),
    fit_median(3.5, include_threshold=False),
    fit_min_ks(),
    fit_peak(),
    fit_peak(published_window=False),
)
LOW, HIGH = np.linspace(-9, -8, 20), np.linspace(0, 3, 60) ** 1.5
ZEROS = [-np.inf] * 20
DEGENERATE = (
    [0.7] * 2,
    [0.7] * 9,
    [-3.0] * 12,
    [],
    ZEROS,
    [*ZEROS, 1.0],
    np.concatenate([LOW, HIGH]),
    np.concatenate([ZEROS, HIGH]),
)
EQUAL, NO_TAIL, FINITE = slice(0, 3), slice(3, 6), slice(6, 8)


def check_degenerate(fit, law):
    """Equal λ give infinity, zeros at the threshold nothing, zeros below no change."""
    alpha, xmin, distance, size = law
    # All ln(λ/xmin) are 0 and every power of λ/xmin is 1, so that D = (n - 1)/n.
    fits = size[EQUAL] > 0
    assert fits[1:].all()
    np.testing.assert_array_equal(alpha[EQUAL], np.where(fits, np.inf, 0))
    expected = 1 - 1 / np.maximum(size[EQUAL], 1)
    np.testing.assert_allclose(distance[EQUAL][fits], expected[fits], rtol=2e-7)
    if isinstance(fit, fit_min_ks):
        np.testing.assert_array_equal(size[EQUAL], 2)

    for column in (alpha[NO_TAIL], xmin[NO_TAIL], size[NO_TAIL]):
        np.testing.assert_array_equal(column, 0)
    assert np.isfinite(distance[NO_TAIL]).all()

    for column in law:
        assert np.isfinite(column[FINITE]).all()
    assert (alpha[FINITE] > 1).all()
    assert (xmin[FINITE] > 0).all()
    if isinstance(fit, fit_median):
        # As many λ stand below the tail, zero or not.
        for column in law:
            assert column[FINITE][0] == column[FINITE][1]


@pytest.mark.parametrize("fit", ALL_FITS, ids=repr)
def test_degenerate_rows(fit):
    """No masked-out branch makes a NaN on the way, compiled or not."""
    table = padded(DEGENERATE, np.float32, (len(DEGENERATE), 80))
    with jax.debug_nans(True):
        for function in (fit, jax.jit(fit)):
            check_degenerate(fit, Law(*map(np.asarray, function(*table))))


@pytest.mark.usefixtures("x64")
def test_ties_count_each_time():
    """Ties at the threshold: all of them above i are in the tail, none below."""
    row = [0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]
    law = fit_rows(fit_median(), [row])
    # i = 3, n = 4, excesses 0, 0, 1, 1.
    assert law.alpha[0] == 3
    assert law.tail_size[0] == 4
    law = fit_rows(fit_median(include_threshold=False), [row])
    assert law.alpha[0] == 3
    law = fit_rows(fit_median(1.5, include_threshold=False), [row])
    # i = 4: threshold the tie below, tail of 3, excesses 0, 1, 1.
    assert law.alpha[0] == 2.5
    assert law.tail_size[0] == 3
    law = fit_rows(fit_min_ks(), [row])
    check_against_brute_force(law, [row], [[True] * 7], np.float64)


# --- invariances --------------------------------------------------------------------


@pytest.mark.parametrize("fit", ALL_FITS, ids=repr)
@pytest.mark.usefixtures("x64")
def test_padding_is_not_seen(fit):
    """What stands in invalid entries, zeros or λ below a floor, has no part in a fit.

    Rows of another table can round otherwise: a sum may be split at other places.
    """
    rows = random_rows(4, (1, 2, 3, 40, 65))
    laws = [fit_rows(fit, rows, filler=filler) for filler in (-np.inf, -50.0, np.nan)]
    for law in laws[1:]:
        for column, first in zip(law, laws[0], strict=True):
            np.testing.assert_array_equal(column, first)
    for i in (0, 2, 4):
        alone = fit_rows(fit, [rows[i]], shape=(1, len(rows[i])))
        relative = hill_tolerance(rows[i], max(len(rows[i]), 2), np.float64)
        assert laws[0].tail_size[i] == alone.tail_size[0]
        assert laws[0].xmin[i] == pytest.approx(alone.xmin[0], rel=4e-16)
        assert laws[0].alpha[i] == pytest.approx(alone.alpha[0], rel=relative)
        assert laws[0].ks_distance[i] == pytest.approx(
            alone.ks_distance[0], abs=relative
        )


@pytest.mark.parametrize("fit", ALL_FITS, ids=repr)
def test_row_of_a_table_equals_the_row_alone(fit):
    """To the bit: rows do not mix, and their order is free."""
    rows = random_rows(5, (65, 65, 40, 30))
    law = fit_rows(fit, rows, np.float32)
    backwards = fit_rows(fit, rows[::-1], np.float32)
    for column, other in zip(law, backwards, strict=True):
        np.testing.assert_array_equal(column, other[::-1])
    for i, row in enumerate(rows):
        alone = fit_rows(fit, [row], np.float32)
        for column, own in zip(law, alone, strict=True):
            assert column[i] == own[0]


@pytest.mark.usefixtures("x64")
def test_published_peak_window_depends_on_the_scale():
    """The slip that parity keeps: log10(0.95·peak) is a bound in another unit.

    It lies at log10(0.95·peak)/peak of the peak: below every λ while the peak is
    below 1, highest, near 0.15, at a peak of e.  The spectrum is a power law from 1
    on with a cluster at e^5, the peak; its best tail starts below 0.15·e^5.
    """
    shifts = (-12.0, -4.0, 35.0)
    law_part = np.log(spectra.pareto_quantiles(1.5, 100))
    row = np.sort(np.concatenate([law_part, np.linspace(5.0, 5.02, 8)]))
    rows = [row + shift for shift in shifts]
    law = fit_rows(fit_peak(), rows)
    windows = [brute_window(logs, 100, published=True) for logs in rows]
    check_against_brute_force(law, rows, windows, np.float64)
    free, cut, freed = law.tail_size
    assert cut < free == freed
    corrected = fit_rows(fit_peak(published_window=False), rows)
    assert len(set(corrected.tail_size.tolist())) == 1


@pytest.mark.usefixtures("x64")
def test_tail_of_a_power_law_is_found():
    """Noise below xmin = 1, an exact power law above: min-KS cuts between them."""
    body = np.log(np.linspace(0.2, 0.9, 40))
    tail = np.log(spectra.pareto_quantiles(2.5, 100))
    law = fit_rows(fit_min_ks(), [np.concatenate([body, tail])])
    assert 90 <= law.tail_size[0] <= 101
    assert law.alpha[0] == pytest.approx(2.5, abs=1.5 / law.tail_size[0])


# --- any row at all -----------------------------------------------------------------

LOGS = st.one_of(
    st.floats(-80, 80),
    st.integers(-3, 3).map(float),
    st.just(-math.inf),
)


@spectra.PROFILE
@given(
    st.lists(LOGS, max_size=40),
    st.sampled_from([1.25, 2, 3.7, 1000]),
    st.booleans(),
)
@pytest.mark.usefixtures("x64")
def test_median_fit_of_any_row(values, position, include_threshold):
    """Against the definition, with its own answer where there is no tail."""
    logs = sorted(values)
    law = fit_rows(fit_median(position, include_threshold), [logs])
    first = math.floor(len(logs) / position)
    threshold = first if include_threshold else first - 1
    if not logs or threshold < 0 or logs[threshold] == -math.inf:
        assert [column[0] for column in law] == [0, 0, 0, 0]
        return
    size = len(logs) - first
    total = math.fsum(value - logs[threshold] for value in logs[first:])
    assert law.tail_size[0] == size
    assert law.xmin[0] == pytest.approx(math.exp(logs[threshold]), rel=1e-13)
    if total == 0:
        assert law.alpha[0] == math.inf
    else:
        # Excesses are differences of exact numbers: each is rounded once.
        tolerance = (size + 4) * eps_of(np.float64)
        assert law.alpha[0] - 1 == pytest.approx(
            size / total, rel=tolerance, abs=eps_of(np.float64)
        )
    assert 0 <= law.ks_distance[0] < 1


@spectra.PROFILE
@given(st.lists(LOGS, max_size=40), st.sampled_from(ALL_FITS[2:]))
@pytest.mark.usefixtures("x64")
def test_best_tail_of_any_row(values, fit):
    """What it reports is the Hill estimate of the tail that it reports."""
    logs = sorted(values)
    law = fit_rows(fit, [logs])
    size = int(law.tail_size[0])
    if size == 0:
        assert law.alpha[0] == 0
        assert law.xmin[0] == 0
        return
    assert size >= 2
    assert logs[-size] > -math.inf
    candidates = brute_candidates(logs, [True] * len(logs))
    alpha, distance = candidates[len(logs) - size]
    if math.isinf(alpha) or math.isinf(law.alpha[0]):
        # Sums of excesses from differences: zero up to rounding, or truly.
        assert law.alpha[0] > 1e11
        assert alpha > 1e11
        return
    relative = hill_tolerance(logs, size, np.float64)
    assert law.alpha[0] - 1 == pytest.approx(alpha - 1, rel=relative)
    assert law.ks_distance[0] == pytest.approx(distance, abs=relative + 1e-15)
    if isinstance(fit, fit_min_ks):
        best = min(distance for _, distance in candidates.values())
        assert law.ks_distance[0] <= best + 1e-9


# --- construction -------------------------------------------------------------------


@pytest.mark.parametrize("position", [1, 1.0, 0.5, 0, -2, math.inf, math.nan])
def test_position_out_of_range(position):
    with pytest.raises(ValueError, match="position must be") as error:
        fit_median(position)
    assert f"position = {position}" in str(error.value)


@pytest.mark.parametrize("bins", [0, -3, True])
def test_bins_out_of_range(bins):
    with pytest.raises(ValueError, match="bins must be an int >= 1") as error:
        fit_peak(bins)
    assert f"bins = {bins!r}" in str(error.value)


def test_fits_compare_by_value():
    makers = [
        lambda: fit_median(),
        lambda: fit_median(3),
        lambda: fit_median(include_threshold=False),
        lambda: fit_min_ks(),
        lambda: fit_peak(),
        lambda: fit_peak(50),
        lambda: fit_peak(published_window=False),
    ]
    for i, make in enumerate(makers):
        for j, other in enumerate(makers):
            assert (make() == other()) == (i == j)
        assert hash(make()) == hash(make())
    assert len({make() for make in makers * 2}) == len(makers)


def test_fits_say_what_they_need():
    """The analysis chooses the route and the unit by these."""
    whole = [fit.whole_spectrum for fit in ALL_FITS]
    assert whole == [False, False, True, True, True]
    assert [fit.absolute for fit in ALL_FITS] == [False, False, False, True, False]
