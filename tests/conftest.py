"""Eight virtual devices for every test, so that the chain axis is real even on one CPU."""

import atexit
import gc
import os
import shutil
import tempfile

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import tests.typechecked  # noqa: F401  (the hook finds it by its name)

CHECKED = ("posterior", "samplers", "engine", "results", "diagnostics")
jaxtyping.install_import_hook([f"slt_jax.{package}" for package in CHECKED], "tests.typechecked.check")

import slt_jax as slt  # noqa: E402

# Compiling is most of the tests' time; `.ci/run` has the quick ones compiled as users have them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

# What one test has compiled, no other compiles again, nor do its processes or the other workers: most of their time.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="slt-jax-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Every compiled program holds memory maps, of which a process may have 65,530: past them the compiler crashes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def wrong_types(monkeypatch):
    """For arguments that the library itself refuses: with jaxtyping's checks on, these would refuse them first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def regression():
    """(posterior, data): a ten-parameter linear model without label noise; w* = 0 is its minimum."""
    data = jax.random.normal(jax.random.key(1), (400, 10))
    loss_fn = lambda p, x: 0.5 * (x @ p["w"]) ** 2  # noqa: E731
    return slt.LocalPosterior(loss_fn, {"w": jnp.zeros(10)}, num_data=400, localization=1.0), data
