"""A process that has imported everything and started nothing, from which runs are forked.

A forked run is a process of its own: real signals end it, it has a real exit code, and the
interpreter shuts down as any other. What it spares is the second or more that imports take. Forking
is sound only while there is a single thread, so the server counts its threads before every fork
and refuses when there are more.

It reads requests from standard input and answers on standard output, a JSON object a line:
{"start": {"arguments", "plants", "env", "out", "err"}} -> {"pid"}; {"wait": pid} -> {"status"}.
"""

import gc
import json
import os
import pathlib
import runpy
import signal
import sys
import threading

import jax
from jax._src import xla_bridge

import jaxmoe.commands.train
import jaxmoe.runs.recipe_loading
from tests.faults import plants

ROOT = pathlib.Path(__file__).parents[2]


def alone():
  """Whether nothing here would be broken by a fork: one thread, and no backend."""
  threads = len(os.listdir("/proc/self/task"))
  return threads == threading.active_count() == 1 and not xla_bridge.backends_are_initialized()


def answer(**fields):
  print(json.dumps(fields), flush=True)


def serve():
  """Answers until the requests end and returns None; returns in each child what it is to run."""
  for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
      answer(status=os.waitpid(request["wait"], 0)[1])
    elif not alone():
      answer(error=f"threads: {os.listdir('/proc/self/task')}")
    else:
      child = os.fork()
      if child == 0:
        return request["start"]
      answer(pid=child)
  return None


def become(run):
  """Turns this process into the run: its own session, streams, environment and faults."""
  os.setsid()  # what the run starts can be ended with it
  for number, path in enumerate((os.devnull, run["out"], run["err"])):
    flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(path, flags, 0o600), number)
  os.environ.update(run["env"])
  sys.argv = ["launch/train.py", *run["arguments"]]
  for each in run["plants"]:
    plants.plant(**each)


def main():
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then end us
  gc.collect()
  gc.freeze()
  assert jax and jaxmoe
  answer(alone=alone())
  run = serve()
  if run is not None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    become(run)
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")


if __name__ == "__main__":
  main()
