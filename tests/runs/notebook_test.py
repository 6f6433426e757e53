"""Runs in IPython, as in a notebook: text streams, nothing else is shown, no setting changes."""

import os
import subprocess
import sys

import jax
import pytest

pytest.importorskip("IPython")
NOTEBOOK = """
import sys
from IPython.core.interactiveshell import InteractiveShell

pieces, write = [], sys.stdout.write
shell = InteractiveShell.instance()
sys.stdout.write = lambda text: (pieces.append(text), write(text))[1]

def cell(code):
  assert shell.run_cell(code).success
  shown = list(pieces)
  pieces.clear()
  return shown

assert cell("import jax, jaxmoe; before = dict(jax.config.values)") == []
assert cell(f"run = jaxmoe.open({sys.argv[1]!r})") == []
pieces_shown = cell("texts = run.generate('copy#', max_tokens=16, temperature=0)")
assert pieces_shown[0] == "copy#" and len(pieces_shown) > 3, pieces_shown
assert "".join(pieces_shown) == f"copy#{shell.user_ns['texts'][0]}\\n"
assert cell("found = run.evaluate(); scores = run.score([[1, 2, 3]])") == []
assert cell("assert dict(jax.config.values) == before") == []
"""


def test_a_notebook_sees_text_as_it_comes_and_nothing_else(trained, tmp_path):
  cache = str(jax.config.jax_compilation_cache_dir)
  own = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "IPYTHONDIR": str(tmp_path)}
  done = subprocess.run(
    [sys.executable, "-c", NOTEBOOK, str(trained)], env={**os.environ, **own},
    capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (0, ""), done.stderr
  assert done.stdout.startswith("copy#") and done.stdout.count("copy#") == 1
