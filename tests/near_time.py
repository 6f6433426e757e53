"""A plugin of pytest for `tests.near`: after some seconds no further test begins."""

import time

import pytest


def pytest_addoption(parser):
  """Adds the seconds."""
  parser.addoption("--near_seconds", type=float, default=0.0)


def pytest_configure(config):
  """Starts the clock."""
  config.near_until = time.monotonic() + config.getoption("near_seconds")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Leaves a test to `make test` where the time is over."""
  if time.monotonic() > item.config.near_until:
    pytest.skip("no time left: make test runs it")
