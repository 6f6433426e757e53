import pathlib
import subprocess
import sys

import pytest

# An audit hook sees every socket and name look-up of the process, whoever makes it.
WATCHED = """
import sys

def watch(event, arguments):
  if event.startswith("socket.") and event not in ("socket.gethostname",):
    raise RuntimeError(f"an import touches the network: {event} {arguments}")

sys.addaudithook(watch)
import MODULE
FOREIGN = ("torch", "transformers", "tensorflow")
found = sorted(name for name in FOREIGN if name in sys.modules)
assert not found, found
"""


def run(module, code):
  program = WATCHED.replace("MODULE", module) + code
  root = pathlib.Path(__file__).parent.parent
  command = [sys.executable, "-c", program]
  return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["jaxmoe.models.transformer", "jaxmoe.adapt"])
def test_an_import_starts_no_backend_opens_no_socket_and_takes_in_no_other_framework(module):
  done = run(
    module,
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge.backends_are_initialized()\n"
    "assert not xla_bridge._backends\n",
  )
  assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_nothing():
  done = run("jaxmoe", "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n")
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  "code, message",
  [
    ("import socket\nsocket.socket()\n", "touches the network"),
    (
      "import jax\njax.devices()\nfrom jax._src import xla_bridge\n"
      "assert not xla_bridge.backends_are_initialized()\n",
      "AssertionError",
    ),
  ],
)
def test_the_watch_itself_sees_a_socket_and_a_backend(code, message):
  done = run("jaxmoe", code)
  assert done.returncode != 0 and message in done.stderr


SOUND = 'exec "$PYTHON_OF_TESTS" "$@"'


@pytest.mark.parametrize("script, anew", [("exit 1", True), (SOUND, False)])
def test_an_environment_of_another_python_is_made_anew(tmp_path, monkeypatch, script, anew):
  monkeypatch.setenv("PYTHON_OF_TESTS", sys.executable)
  python = tmp_path / "bin" / "python"
  python.parent.mkdir()
  python.write_text(f"#!/bin/sh\n{script}\n")
  python.chmod(0o755)
  (tmp_path / "installed").touch()
  root = pathlib.Path(__file__).parent.parent
  old = ("-o", "setup.cfg", "-o", "pyproject.toml")
  command = ["make", "-n", *old, "quickstart", f"VENV={tmp_path}"]
  said = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60).stdout
  assert "launch.train" in said
  assert (f"-m venv --clear {tmp_path}" in said, "pip install" in said) == (anew, anew)
