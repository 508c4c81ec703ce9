"""Power-law fits against closed forms, brute force and their own invariances."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
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
SIZES = (2, 3, 5, 17, 64, 65, 130)


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


# --- all tails ----------------------------------------------------------------------


def candidates(logs, window=None):
    """Alpha and KS distance of the tail from each entry on but the last."""
    with np.errstate(all="ignore"):
        tried = reference.candidates(np.exp(logs), window)
    return np.where(np.isfinite(logs[:-1]), tried, [[0], [1]])


def check_best_tails(law, rows, windows, dtype):
    """The fit must be one of the best candidates, and report it right."""
    several = 0
    for i, (logs, window) in enumerate(zip(rows, windows, strict=True)):
        alphas, distances = candidates(logs, window)
        if not alphas.any():
            assert law.alpha[i] == law.tail_size[i] == 0
            continue
        first = len(logs) - int(law.tail_size[i])
        # d(distance)/d(alpha - 1) = excess·(λ/xmin)^(1-alpha) <= 1/(e·(alpha - 1)),
        # so that D moves by at most the relative error of alpha - 1 over e.
        relative = hill_tolerance(logs, len(logs) - first, dtype)
        error = relative + 4 * eps_of(dtype)
        assert distances[first] <= distances.min() + relative + error
        assert law.alpha[i] - 1 == pytest.approx(alphas[first] - 1, rel=relative)
        assert law.ks_distance[i] == pytest.approx(distances[first], abs=error)
        rounding = 2 * eps_of(dtype) * (1 + abs(logs[first]))
        assert math.log(law.xmin[i]) == pytest.approx(logs[first], abs=rounding)
        several += np.count_nonzero(alphas) > 1
    assert several >= len(rows) // 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.usefixtures("x64")
def test_min_ks_is_the_best_of_all_tails(dtype):
    rows = random_rows(0, SIZES * 2)
    law = fit_rows(fit_min_ks(), rows, dtype)
    check_best_tails(law, rows, [None] * len(rows), dtype)


@pytest.mark.parametrize("bins", [100, 7])
@pytest.mark.parametrize("published", [True, False])
@pytest.mark.usefixtures("x64")
def test_peak_is_the_best_tail_of_its_window(published, bins):
    rows = random_rows(1, SIZES[2:] * 4, scales=(1.0, 1e-3, 1e3, 30.0))
    law = fit_rows(fit_peak(bins, published), rows)
    windows = [
        reference.peak_window(np.exp(row), bins, published=published) for row in rows
    ]
    check_best_tails(law, rows, windows, np.float64)
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


# --- invariances --------------------------------------------------------------------


@pytest.mark.parametrize("fit", ALL_FITS, ids=repr)
@pytest.mark.usefixtures("x64")
def test_a_row_has_the_law_that_it_has_alone(fit):
    """To the bit: rows do not mix, and what stands in invalid entries is not seen.

    Rows of a table of another width can round otherwise: a sum may be split at other
    places.
    """
    rows = random_rows(4, (1, 2, 3, 40, 65, 65))
    law = fit_rows(fit, rows)
    laws = [fit_rows(fit, rows, filler=filler) for filler in (-50.0, np.nan)]
    backwards = fit_rows(fit, rows[::-1])
    for other in (*laws, Law(*(column[::-1] for column in backwards))):
        for column, own in zip(law, other, strict=True):
            np.testing.assert_array_equal(column, own)
    for i, row in enumerate(rows):
        alone = fit_rows(fit, [row])
        assert [column[i] for column in law] == [column[0] for column in alone]
    for i in (0, 2, 4):
        alone = fit_rows(fit, [rows[i]], shape=(1, len(rows[i])))
        relative = hill_tolerance(rows[i], max(len(rows[i]), 2), np.float64)
        assert law.tail_size[i] == alone.tail_size[0]
        assert law.xmin[i] == pytest.approx(alone.xmin[0], rel=4e-16)
        assert law.alpha[i] == pytest.approx(alone.alpha[0], rel=relative)
        distance = pytest.approx(alone.ks_distance[0], abs=relative)
        assert law.ks_distance[i] == distance


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
    windows = [reference.peak_window(np.exp(logs)) for logs in rows]
    check_best_tails(law, rows, windows, np.float64)
    free, cut, freed = law.tail_size
    assert cut < free == freed
    corrected = fit_rows(fit_peak(published_window=False), rows)
    assert len(set(corrected.tail_size.tolist())) == 1


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
    """Against the definition, ties and zeros included; zeros where there is no tail."""
    logs = sorted(values)
    law = fit_rows(fit_median(position, include_threshold), [logs])
    first = math.floor(len(logs) / position)
    threshold = first if include_threshold else first - 1
    if not logs or threshold < 0 or logs[threshold] == -math.inf:
        assert [column[0] for column in law] == [0, 0, 0, 0]
        return
    size = len(logs) - first
    excess = np.asarray(logs[first:]) - logs[threshold]
    total, rank = math.fsum(excess), np.arange(size) / size
    assert law.tail_size[0] == size
    assert law.xmin[0] == pytest.approx(math.exp(logs[threshold]), rel=1e-13)
    if total == 0:
        assert law.alpha[0] == math.inf
        assert law.ks_distance[0] == pytest.approx(rank[-1], rel=1e-15)
        return
    # Excesses are differences of exact numbers: each is rounded once.
    tolerance, eps = (size + 4) * eps_of(np.float64), eps_of(np.float64)
    slope = pytest.approx(size / total, rel=tolerance, abs=eps)
    assert law.alpha[0] - 1 == slope
    distance = np.abs(1 - np.exp(-size / total * excess) - rank).max()
    assert law.ks_distance[0] == pytest.approx(distance, abs=tolerance)


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
    alphas, distances = candidates(np.asarray(logs))
    alpha, distance = alphas[-size + 1], distances[-size + 1]
    if math.isinf(alpha) or math.isinf(law.alpha[0]):
        # Sums of excesses from differences: zero up to rounding, or truly.
        assert law.alpha[0] > 1e11
        assert alpha > 1e11
        return
    relative = hill_tolerance(logs, size, np.float64)
    assert law.alpha[0] - 1 == pytest.approx(alpha - 1, rel=relative)
    assert law.ks_distance[0] == pytest.approx(distance, abs=relative + 1e-15)
    if isinstance(fit, fit_min_ks):
        assert law.ks_distance[0] <= distances.min() + 1e-9


def test_fits_say_what_they_need():
    """The analysis chooses the route and the unit by these."""
    whole = [fit.whole_spectrum for fit in ALL_FITS]
    assert whole == [False, False, True, True, True]
    assert [fit.absolute for fit in ALL_FITS] == [False, False, False, True, False]
