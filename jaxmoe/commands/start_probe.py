"""A command in a process of its own that counts what JAX traced and compiled; for `bench start`.

python -m jaxmoe.commands.start_probe FILE NAME FLAGS...
"""

from __future__ import annotations

import collections
import importlib
import json
import pathlib
import sys

import jax

_TRACE, _PROGRAM = (
  f"/jax/core/compile/{part}_duration" for part in ("jaxpr_trace", "backend_compile")
)
_FETCHED, _COMPILED = (f"/jax/compilation_cache/cache_{part}" for part in ("hits", "misses"))


def main(out: str, name: str, flags: list[str]) -> None:
  """Runs a command, and writes the number of events when it ends, however it does."""
  counts: collections.Counter[str] = collections.Counter()
  traced: collections.Counter[str] = collections.Counter()

  def of_duration(event: str, duration_secs: float, **details: str | int) -> None:
    del duration_secs
    counts[event] += 1
    if event == _TRACE:
      traced[str(details.get("fun_name", "?"))] += 1

  def of_event(event: str, **details: str | int) -> None:
    del details
    counts[event] += 1

  jax.monitoring.register_event_duration_secs_listener(of_duration)
  jax.monitoring.register_event_listener(of_event)
  sys.argv = [f"jaxmoe/{name}", *flags]
  try:
    importlib.import_module(f"jaxmoe.commands.{name}").run()
  finally:
    found = {"traces": counts[_TRACE], "programs": counts[_PROGRAM]}
    found |= {"compiled": counts[_COMPILED], "fetched": counts[_FETCHED]}
    record = {**found, "traced": dict(traced.most_common(12))}
    pathlib.Path(out).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], sys.argv[3:])
