"""Runs that tests of the library share with those of the commands."""

import pytest

from tests.commands.conftest import _settings_are_the_tests, checkpoint, run_here, text, trained

__all__ = ["_settings_are_the_tests", "checkpoint", "text", "trained"]


@pytest.fixture(scope="session")
def run_command():
  """Returns `run_here(name, *arguments) -> Result`."""
  return run_here
