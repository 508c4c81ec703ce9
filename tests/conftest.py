"""Fixtures that every test module may use, and the runs that are only for long ones."""

import gc
import logging
import os
import shutil
from pathlib import Path

# Threads of BLAS wait for each other in loops, which takes the cores from all others.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import pytest

# What one module or worker has compiled is compiled for all, and for the next run too.
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
PROGRAMS_BYTES = 2**30
for option, value in {
    "jax_compilation_cache_dir": str(PROGRAMS),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # No program says which lines of Python it comes from.
    "jax_traceback_in_locations_limit": 0,
}.items():
    jax.config.update(option, value)
    os.environ[option.upper()] = str(value)  # For the processes that tests start.

# jaxlib 0.10 can emit fused loops in two ways: the one that it does not take by default
# compiles the tests in a third of the time. Later versions have one way alone, in which
# `.ci/run newest` runs all tests.
FLAGS = os.environ.get("XLA_FLAGS", "")
if jax.__version__.startswith("0.10.") and "fusion_emitters" not in FLAGS:
    os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_cpu_use_fusion_emitters=false"


# Traces are many objects that no cycle holds.
gc.set_threshold(100_000, 50, 50)


def pytest_sessionstart(session):
    """Deletes the compiled programs of earlier runs if they have become too many."""
    if hasattr(session.config, "workerinput"):
        return
    sizes = [file.stat().st_size for file in PROGRAMS.glob("*")]
    if sum(sizes) > PROGRAMS_BYTES:
        shutil.rmtree(PROGRAMS)


@pytest.fixture
def alike():
    """Compiler options that give one formula in two programs the same bits."""
    quick = "emitters=false" in os.environ.get("XLA_FLAGS", "")
    return (("xla_cpu_use_fusion_emitters", True),) if quick else ()


@pytest.fixture(scope="module", autouse=True)
def no_old_programs():
    """Frees what modules have compiled: a process can map only so many programs."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def print_record(request):
    """Prints what a module of golden tests has compared, where `-s` shows it."""
    yield
    record = getattr(request.module, "RECORD", None)
    if hasattr(record, "table"):
        print(record.table())


# Why a matrix may be neither a layer nor a follower.
STATED = (
    "acts on",
    "cannot be cut as",
    "complex",
    "embedding",
    "enters a product in the place of data",
    "is where a loop starts",
    "is written into an array of data",
    "left out by axes=",
    "lies next to data in one array",
    "look-up table",
    "multiplies data as a vector",
    "norm: follows no layer",
)


@pytest.fixture(autouse=True)
def every_leaf_has_one_verdict(monkeypatch):
    """Asserts the law of `trace_layers` on every model that a test traces."""
    from tb_optax import trace

    read = trace.roles_of

    def lawful(record, norms, split):
        roles = read(record, norms, split)
        assert not roles.notes.keys() & roles.unclear.keys()
        assert roles.notes.keys() | roles.unclear.keys() == record.shapes.keys()
        layers = {layer.path for layer in roles.layers}
        assert layers == {path for path, note in roles.notes.items() if note == "layer"}
        owners = {f: layer.path for layer in roles.layers for f in layer.follows}
        for path, note in roles.notes.items():
            assert (note == f"follows {owners.get(path)}") == (path in owners), path
            if path not in layers and path not in owners and record.is_matrix(path):
                assert note.startswith(STATED), f"{path!r}: {note}"
        return roles

    monkeypatch.setattr(trace, "roles_of", lawful)


# Modules that compare numbers, on layers that are few or small by design. The warnings
# themselves are tested in test_symptoms and the contract tests.
FEW_OR_SMALL_LAYERS = (
    *("eight_devices", "test_benchmarks", "test_faults", "test_fuzz", "test_golden"),
    *("test_memory", "test_placement", "test_processes", "test_properties"),
    "test_quadrature",
)


# Modules that take long go first: the last ones to end decide how long all take.
SLOWEST = (
    *("test_golden_metrics", "test_golden_rates", "test_golden_edge_cases"),
    *("test_sharding", "test_family_golden", "test_windows", "test_contract_wrappers"),
    *("test_analysis", "test_contract", "test_family", "test_golden_trajectory"),
    *("test_spectrum", "test_spread", "test_lanczos"),
    *("test_faults", "test_power_law", "test_processes", "test_quadrature"),
    *("test_benchmarks_runs", "test_command", "test_frameworks_training"),
    *("test_symptoms", "test_benchmarks_language", "test_when", "test_family_training"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Deals files out whole, in order; those that share golden analyses together."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "golden" if any(f"/{n}.py" in file for n in SLOWEST[:3]) else file

    config.option.loadscopereorder = False
    return Scheduler(config, log)


def pytest_collection_modifyitems(config, items):
    """Leaves tests marked long out, unless `-m` asks for something."""
    place = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if item.path.name.startswith(FEW_OR_SMALL_LAYERS):
            for message in ("no layer reaches", "only one layer can be tuned"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))
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


# Modules that compile as users do: they prove numbers, memory, or speed.
AS_USERS_DO = (
    *("test_eigenvalues", "test_golden_trajectory", "test_lanczos", "test_memory"),
    *("test_power_law", "test_spectrum"),
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Compiles with few optimizations: most tests compile much and run little."""
    before = jax.config.read("jax_disable_most_optimizations")
    quick = before or not request.path.name.startswith(AS_USERS_DO)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# Modules in which code of others promotes types or ranks: Adam and schedules of Optax,
# norms of Flax, models and steps that are written as people write them.
PROMOTING = (
    *("test_benchmarks", "test_contract", "test_family_training", "test_frameworks"),
    *("test_fuzz", "test_golden_trajectory", "test_placement", "test_site"),
    *("test_symptoms", "test_trac", "test_when"),
)


@pytest.fixture(scope="module", autouse=True)
def no_implicit_promotion(request):
    """Makes implicit promotion of types and ranks an error."""
    if request.path.name.startswith(PROMOTING):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


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
