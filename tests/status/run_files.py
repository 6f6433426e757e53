"""Files of runs as the trainer writes them, written by hand."""

import contextlib
import fcntl
import json
import os
import socket

NOW = 2_000_000_000.0
PROCESS = {"event": "process", "pid": os.getpid(), "host": socket.gethostname()}
STARTED = {"unix_s": NOW, "started_unix_s": NOW - 10, "last_alive_unix_s": None}


def layer(experts, used=None, **fields):
  """Returns what a line says of a layer whose load is even over the experts used."""
  used = experts if used is None else used
  load = [1 / used] * used + [0.0] * (experts - used)
  values = {"load_entropy": 0.98765, "max_violation": experts / used - 1, "dead": experts - used}
  return {"load": load, **values, "drop_rate": 0.0123, "effective_k": 1.9876, **fields}


def line(step, layers=2, experts=8, **fields):
  """Returns a line of metrics.jsonl."""
  seconds = {"step": 0.5, "data": 0.25, "compile": 0.0}
  speed = {"unix_s": NOW + step, "tokens_per_s": 1000.0 + step, "mfu": 0.125, "seconds": seconds}
  return {
    "step": step,
    "loss": 3.25,
    "grad_norm": 0.5,
    "learning_rate": 1e-3,
    "tokens": 256,
    "skipped": 1,
    "layers": {str(depth): layer(experts) for depth in range(layers)},
    "time": speed,
    **fields,
  }


def write_run(run, lines=(), events=(), num_steps=100, checkpoints=()):
  """Writes the files of a run, last touched at NOW + 97; returns its folder."""
  run.mkdir()
  (run / "config.json").write_text(json.dumps({"train": {"num_steps": num_steps}}))
  (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
  (run / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
  (run / "lock").touch()
  for step in checkpoints:
    (run / "checkpoints" / str(step)).mkdir(parents=True)
    os.utime(run / "checkpoints" / str(step), (NOW, NOW))
  for file in ("metrics.jsonl", "lock"):
    os.utime(run / file, (NOW + 97, NOW + 97))
  return run


@contextlib.contextmanager
def held(run):
  """Holds the lock of a run as launch.train does."""
  with open(run / "lock", "ab") as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
