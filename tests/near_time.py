"""A plugin of pytest for `tests.near`: after some time no further test begins, and none fails."""

import os
import sys
import time

import pytest


def pytest_addoption(parser):
  """Adds the time, in unix seconds."""
  parser.addoption("--near_until", type=float, default=0.0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Leaves a test to `make test` where the time is over."""
  if time.time() > item.config.getoption("near_until"):
    pytest.skip("no time left: make test runs it")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
  """Fails for what failed before the interrupt that ended the time, not for that."""
  if session.exitstatus == pytest.ExitCode.INTERRUPTED:
    session.exitstatus = pytest.ExitCode(int(bool(session.testsfailed)))
  session.config.near_code = int(session.exitstatus)


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config):
  """Ends at once: workers would be waited for until they end, and an interrupt then would fail."""
  if hasattr(config, "near_code") and not hasattr(config, "workerinput"):
    sys.stdout.flush()
    os._exit(config.near_code)
