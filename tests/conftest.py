"""Process-wide JAX settings of the tests, made before the backend starts."""

import os
import pathlib
import tempfile

import jax
import pytest

from jaxmoe.commands.process.compile_fast import compile_fast

CACHE = pathlib.Path(tempfile.gettempdir()) / f"jaxmoe-test-cache-{os.getuid()}"
# Threads of XLA: a device that waits in a collective holds one, and there are eight devices.
os.environ.setdefault("NPROC", "16")
if "XLA_FLAGS" not in os.environ:  # given, even if empty, they are left as they are
  compile_fast()
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # what names no device runs on the first
# Also in processes that tests start: sums of products depend on it, bit for bit.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"


@pytest.fixture(autouse=True)
def _home_is_temporary(tmp_path, monkeypatch):
  """No test reads or writes the caches of the person who runs it."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
  """A process may map only so many programs (vm.max_map_count); those of a file go with it."""
  yield
  jax.clear_caches()
