import ctypes
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import resource

from jaxmoe.commands.process.malloc import keep_freed_memory

keep_freed_memory()

import jax
import jax.numpy as jnp

SIZE = 5120  # 100 MB, above what a thread's own heap can hold
PAGES = 4 * SIZE * SIZE // 4096


@jax.jit
def step(x):
  return jax.lax.fori_loop(0, x[0].astype(int), lambda i, y: y + i, jnp.zeros((SIZE, SIZE)))[0]


def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(jnp.ones(3)).block_until_ready()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


print(min(faults() for _ in range(12)) / PAGES)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_temporaries_larger_than_the_heap_of_a_thread_are_mapped_once():
  """The least of some calls: a heap takes a few until it has room beside what stays."""
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  command = [sys.executable, "-c", PROGRAM]
  done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
  assert float(done.stdout) < 0.1


HEAP = """
import re

from jaxmoe.commands.process.malloc import keep_freed_memory

keep_freed_memory()
some = bytearray(2**28)
areas = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read())
heap = [area for area in areas if "[heap]" in area]
flags = [re.search(r"VmFlags:(.*)", area)[1].split() for area in heap]
sizes = [int(re.search(r"(?m)^Rss: +([0-9]+)", area)[1]) for area in heap]
print(sum(size for size, has in zip(sizes, flags) if "hg" in has) / sum(sizes))
"""


@pytest.mark.skipif(
  not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists()
  or not hasattr(ctypes.CDLL(None), "mallopt"),
  reason="no large pages to ask for, or not glibc",
)
def test_the_heap_asks_for_large_pages():
  done = subprocess.run([sys.executable, "-c", HEAP], check=True, capture_output=True, text=True)
  assert float(done.stdout) > 0.9
