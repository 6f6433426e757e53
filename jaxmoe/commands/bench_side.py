"""jaxmoe's side of a race between processes, set up as every command is; started by `bench`."""

from __future__ import annotations

from jaxmoe.bench.sides import own
from jaxmoe.bench.sides.protocol import serve
from jaxmoe.commands.process import jax_settings

if __name__ == "__main__":
  jax_settings.set_up_jax()
  serve((), own.handlers)
