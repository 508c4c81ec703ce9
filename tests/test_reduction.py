"""Matrices to vectors: in whatever company, a matrix has the same ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tb_optax import reduction
from tb_optax.reduction import HOUSEHOLDER, SVD, reduce_matrices


def symmetric_arrays(counts, n):
    """Arrays of random symmetric matrices."""
    generator = np.random.default_rng(0)
    full = [generator.normal(size=(count, n, n)) for count in counts]
    return [jnp.asarray(a + a.swapaxes(1, 2), jnp.float32) for a in full]


def doubled(matrices):
    """A preparation, with a second result."""
    return 2 * matrices, matrices.sum(axis=(1, 2))


def lowered(arrays, method):
    """The program for this platform."""
    program = jax.jit(lambda arrays: reduce_matrices([arrays], method, doubled))
    return program.lower(arrays)


@pytest.fixture
def one_blas_thread(monkeypatch):
    """What the library reads: not what OpenBLAS does in this process."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")


@pytest.mark.parametrize("counts", [(1,), (9,), (64, 1), (33, 1, 36)])
def test_calls_side_by_side_give_the_bits_of_one_at_a_time(monkeypatch, counts):
    arrays = symmetric_arrays(counts, 256)
    results, calls = [], []
    for threads in ("1", "2"):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        program = lowered(arrays, HOUSEHOLDER)
        calls.append(program.as_text().count("@lapack_ssytrd"))
        results.append(program.compile()(arrays))
    if sum(counts) * 256**3 >= 10**9:
        assert 9 < calls[0] <= reduction.TOGETHER
    else:
        assert calls[0] == 1
    assert calls[1] == 1
    (ours, our_sums), (theirs, their_sums) = results
    np.testing.assert_array_equal(our_sums, their_sums)
    np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])
    # What stands before the first row of a matrix is not read.
    np.testing.assert_array_equal(ours[:, 1, 1:], theirs[:, 1, 1:])


@pytest.mark.usefixtures("one_blas_thread")
def test_arrays_and_preparation_stay_in_order():
    arrays = symmetric_arrays((33, 1, 36), 256)
    vectors, sums = lowered(arrays, HOUSEHOLDER).compile()(arrays)
    matrices = np.concatenate(arrays)
    np.testing.assert_allclose(sums, matrices.sum(axis=(1, 2)), rtol=1e-3, atol=1e-3)
    # The trace of a similar matrix is the same.
    trace = 2 * np.trace(matrices, axis1=1, axis2=2)
    np.testing.assert_allclose(vectors[:, 0].sum(axis=1), trace, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("one_blas_thread")
def test_singular_values_are_never_side_by_side():
    arrays = symmetric_arrays((64,), 256)
    assert lowered(arrays, SVD).as_text().count("@lapack_sgesdd") == 1


@pytest.mark.usefixtures("one_blas_thread")
def test_the_largest_matrices_are_reduced_one_at_a_time():
    arrays = [jax.ShapeDtypeStruct((16, 2048, 2048), jnp.float32)]
    assert lowered(arrays, HOUSEHOLDER).as_text().count("@lapack_ssytrd") == 1
