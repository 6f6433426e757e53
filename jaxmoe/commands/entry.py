"""`jaxmoe NAME ...`: the entry point of all commands."""

from __future__ import annotations

import gc
import importlib
import sys

from jaxmoe.commands import COMMANDS
from jaxmoe.commands.process.command_line import fail


def main() -> None:
  """Runs the command that the first word names, and exits."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("--help", "-h", "help"):
    width = max(map(len, COMMANDS))
    lines = [f"  jaxmoe {known:<{width}}  {what}" for known, what in COMMANDS.items()]
    print("\n".join(["Mixture-of-Experts language models in JAX.", "", *lines]))
    print("\njaxmoe NAME --help lists the flags of a command.")
    sys.exit(0)
  if name not in COMMANDS:
    fail(f"jaxmoe {name}: no such command; there are: {', '.join(COMMANDS)}", 2)
  del sys.argv[1]
  run(name)


def run(name: str) -> None:
  """Runs a command as this process does, and exits.

  What modules make while they are imported stays: to look again and again for what of it can go
  takes an eighth of the time of the imports.
  """
  gc.disable()
  try:
    command = importlib.import_module(f"jaxmoe.commands.{name}")
  finally:
    gc.freeze()
    gc.enable()
  command.run()


if __name__ == "__main__":
  main()
