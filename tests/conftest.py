"""Fixtures that every test module may use, and the runs that are only for long ones."""

import logging

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def no_old_programs():
    """Frees what a module has compiled: a process can map only so many programs."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(config, items):
    """Leaves tests marked long out, unless `-m` asks for something."""
    if config.getoption("-m"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture
def x64():
    """Runs a test with 64-bit types, and restores what was set before."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles with few optimisations, for tests that compile much and run little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def compilations(caplog):
    """A function that lists what JAX has compiled since the test's start.

    Names are those of the compiled functions, as in `["jit(step)"]`.
    """

    def names() -> list[str]:
        words = [record.getMessage().split() for record in caplog.records]
        return [w[1] for w in words if len(w) > 1 and w[0] == "Compiling"]

    with caplog.at_level(logging.WARNING), jax.log_compiles(True):
        yield names
