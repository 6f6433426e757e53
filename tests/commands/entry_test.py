"""The entry point: nothing is collected while a command is imported, and later as ever."""

import gc
import importlib
import types

import pytest

from jaxmoe.commands import entry


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_during_imports_alone(monkeypatch, fails):
  seen = []

  def fetch(name):
    seen.append((name, gc.isenabled()))
    if fails:
      raise ImportError(name)
    return types.SimpleNamespace(run=lambda: seen.append(("run", gc.isenabled())))

  monkeypatch.setattr(importlib, "import_module", fetch)
  try:
    if fails:
      with pytest.raises(ImportError):
        entry.run("toy")
    else:
      entry.run("toy")
  finally:
    gc.unfreeze()
  assert gc.isenabled()
  assert seen == [("jaxmoe.commands.toy", False), *([] if fails else [("run", True)])]
