"""The first and the last events of a process of a run, and the digest of its state."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from typing import Any

import jax

from jaxmoe.checkpoint.digest import digest
from jaxmoe.core import multihost
from jaxmoe.core.errors import CheckpointError
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.stream import BatchStream
from jaxmoe.train import held_out_slice
from jaxmoe.train.evaluate import compressors
from jaxmoe.train.hooks import EvaluationHook
from jaxmoe.train.observers import Observers
from jaxmoe.train.train_state import State, StateSpec
from jaxmoe.train.workdir import Workdir


def tell_process(observers: Observers, workdir: Workdir) -> None:
  """Writes the event `process`: what this process is, and when the one before was last alive."""
  devices = jax.devices()
  times = {
    "started_unix_s": round(observers.clock.started_unix_s, 3),
    "last_alive_unix_s": workdir.last_alive_unix_s,
    "seconds": observers.clock.take("start"),
  }
  observers.log.event(
    "process", time=times, pid=os.getpid(), host=platform.node(),
    python=platform.python_version(), jax=jax.__version__,
    devices=f"{len(devices)} x {devices[0].device_kind}", processes=jax.process_count(),
  )  # fmt: skip


def about_run(
  corpus: Corpus, num_params: int, evaluation: EvaluationHook, recipe: dict[str, Any] | None
) -> dict[str, Any]:
  """Returns what the first event of a new run says; nothing where no file is written."""
  if not multihost.is_main_process():
    return {}
  data = {"digest": corpus.digest, "domains": corpus.statistics, "skipped": corpus.skipped}
  data[held_out_slice.KEY] = evaluation.slice.plain()
  data["compressors"] = compressors(evaluation.domains, evaluation.among)
  return {"params": num_params, "recipe": recipe, "data": data}


def tell_end(
  done: bool, step: int, state: State, spec: StateSpec, stream: BatchStream, observers: Observers
) -> None:
  """Writes the last event of the process, and returns once all lines are on the disk.

  Raises:
    CheckpointError: the disk refuses them.
  """
  event_fields = {"step": step, "digest": state_digest(spec, state), "data": stream.stats()}
  if unlabelled := int(state.unlabelled):
    event_fields["unlabelled"] = unlabelled
    observers.display.say(
      f"{unlabelled:,} of {step:,} steps had no token with a label, and changed nothing; with a "
      "larger train.batch_size or data.seq_len there are fewer"
    )
  seconds = observers.clock.take("checkpoint")
  observers.log.event("done" if done else "stopped", time={"seconds": seconds}, **event_fields)
  with multihost.raise_on_all():
    try:
      observers.log.sync()
    except OSError as error:
      raise CheckpointError(
        f"step {step} is saved, but its last lines cannot be written: {error}; the same command "
        "goes on once they can"
      ) from None


def state_digest(spec: StateSpec, state: State) -> str:
  """Returns one digest of the whole state: of all names and their arrays' digests."""
  arrays = spec.to_arrays(state)
  if not int(state.unlabelled):  # the digests of runs of before know no such leaf
    del arrays["unlabelled"]
  words = digest(arrays)
  return hashlib.sha256(json.dumps(sorted(words.items())).encode()).hexdigest()[:16]
