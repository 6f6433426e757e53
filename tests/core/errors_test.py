"""What a machine refuses is a line; what is wrong with the code keeps its traceback."""

import errno

import jax
import pytest

from jaxmoe.core.errors import machine_error

DEFECTS = (ValueError("x"), KeyError("x"), RuntimeError("out of memory"), BrokenPipeError(32, "x"))


@pytest.mark.parametrize("error", DEFECTS, ids=repr)
def test_a_defect_stays_one(error):
  assert machine_error(error) is None


@pytest.mark.parametrize(
  ("error", "words"),
  [
    (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device; "),
    (OSError(errno.EIO, "Input/output error"), "Input/output error; "),
    (TimeoutError(), "TimeoutError; "),
    (MemoryError(), "there is not enough memory; ask for less"),
    (MemoryError("Unable to\n allocate 5 TiB"), "not enough memory (Unable to allocate 5 TiB)"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "memory"),
    (jax.errors.JaxRuntimeError("INTERNAL: Out of memory allocating 9 bytes."), "memory"),
  ],
  ids=repr,
)
def test_a_refusal_is_told_in_one_line(error, words):
  told = machine_error(error)
  assert told.code == 2 and words in str(told) and "\n" not in str(told)


def test_other_errors_of_a_program_are_defects():
  assert machine_error(jax.errors.JaxRuntimeError("INTERNAL: no such thing")) is None
