"""jaxmoe as a side of a race: steps and texts of a shape of `model_shapes`, from its fresh weights.

What rivals need lies in a folder: `weights`, a checkpoint in the form of transformers, and after a
step `moments`, the first moments of the optimizer in the same form, which are the gradient but for
a factor.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmoe.bench import cut_rows
from jaxmoe.bench.ideal_work import step_work
from jaxmoe.bench.model_shapes import experiment_of, small
from jaxmoe.bench.program_counts import counted_draw, counted_row
from jaxmoe.bench.sides.protocol import clocked
from jaxmoe.conversion.hf_export import params_to_hf
from jaxmoe.conversion.hf_files import Origin
from jaxmoe.core.rng import Keys
from jaxmoe.hlo.compiled import collectives
from jaxmoe.models.generate import Sampling, generate
from jaxmoe.parallel import make_layout
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.step import abstract_batch, abstract_state, lower_step
from jaxmoe.train.train_state import StateSpec


def batch_of(experiment: Experiment) -> dict[str, np.ndarray]:
  """Returns rows of random ids, each a document of its own, with the id that follows as label."""
  rows, length = experiment.train.batch_size, experiment.data.seq_len
  vocab_size = experiment.data.tokenizer.vocab_size
  ids = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1)).astype(np.int32)
  places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  ones = np.ones((rows, length), np.int32)
  return {
    "ids": ids[:, :-1],
    "labels": ids[:, 1:],
    "position": places,
    "segment": ones,
    "domain": 0 * ones,
  }


def lowered_step(experiment: Experiment) -> tuple[StateSpec, jax.stages.Lowered]:
  """Returns the state and the step of a recipe on the first devices, lowered from shapes alone."""
  decoder = experiment.decoder()
  layout = make_layout(experiment.parallel, jax.devices()[: experiment.parallel.num_devices])
  window, masters = experiment.train.recovery.spike_window, experiment.masters(decoder)
  spec = StateSpec(decoder, experiment.transform(decoder), layout, window, masters)
  arguments = abstract_state(spec), abstract_batch(experiment, layout)
  return spec, lower_step(experiment, decoder, spec, layout, *arguments)


def on_devices(axis: str, number: int) -> dict[str, Any]:
  """Returns what one of so many devices of an axis computes, moves and sends in a step.

  It is a step of 8 rows of 128 tokens of a small model, however many devices there are.
  """
  experiment = small(256, 8, 2, 256, layers=2)
  degrees: dict[str, Any] = {axis: number}
  experiment = dataclasses.replace(
    experiment,
    train=dataclasses.replace(experiment.train, batch_size=8),
    data=dataclasses.replace(experiment.data, seq_len=128),
    parallel=dataclasses.replace(experiment.parallel, **degrees),
  )
  compiled = lowered_step(experiment)[1].compile()
  mesh = make_layout(experiment.parallel, jax.devices()[:number]).mesh
  sent = sum(one.total_wire_bytes for one in collectives(compiled, mesh))
  row = counted_row(f"{number} devices", compiled, step_work(experiment).times(1 / number))
  return {**row, "wire_bytes": sent}


def save(experiment: Experiment, params: Any, folder: pathlib.Path, name: str) -> None:
  """Writes parameters, or what is shaped like them, as a checkpoint."""
  (folder / "tokenizer.json").write_text(json.dumps({"kind": "bytes"}), encoding="utf-8")
  origin = Origin(folder / "none", folder / "tokenizer.json")
  params_to_hf(experiment, params, origin, str(folder / name), "float32")


class OwnStep:
  """Training steps."""

  def __init__(self, shape: str, folder: str):
    self._folder, self._experiment = pathlib.Path(folder), experiment_of(shape)
    spec, lowered = lowered_step(self._experiment)
    self._step = lowered.compile()
    self._state = spec.init(self._experiment.train.seed)
    batch = batch_of(self._experiment)
    save(self._experiment, self._state.params, self._folder, "weights")
    np.savez(self._folder / "batch.npz", ids=batch["ids"], labels=batch["labels"])
    self._batch = {name: jnp.asarray(rows) for name, rows in batch.items()}

  def first(self) -> dict[str, float]:
    """Does one step and writes its moments; returns the whole loss and the gradient's norm."""
    metrics = self._next()
    moments = optax.tree_utils.tree_get(self._state.optimizer, "mu")
    save(self._experiment, moments, self._folder, "moments")
    return {"loss": float(metrics["total_loss"]), "norm": float(metrics["grad_norm"])}

  def counts(self) -> dict[str, Any]:
    """Returns what the program of a step does."""
    return counted_row("jaxmoe", self._step, step_work(self._experiment))

  def steps(self, number: int) -> list[float]:
    """Returns the seconds of so many steps."""

    def run() -> None:
      for _ in range(number):
        metrics = self._next()
      jax.block_until_ready((self._state, metrics))

    return clocked(run)

  def _next(self) -> Any:
    self._state, metrics = self._step(self._state, self._batch)
    return metrics


class OwnText:
  """Greedy continuations of prompts."""

  def __init__(self, shape: str, folder: str):
    self._experiment = experiment = experiment_of(shape)
    self._decoder = experiment.decoder()
    self._params = self._decoder.init(Keys.from_seed(experiment.train.seed))
    save(experiment, self._params, pathlib.Path(folder), "weights")

  def write(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Returns the likeliest next ids of each prompt; none of them ends a row."""
    rows = [np.asarray(prompt, np.int32) for prompt in prompts]
    sampling = Sampling(max_tokens=max_tokens, temperature=0)
    limits = len(prompts[0]) + max_tokens, frozenset[int]()
    return generate(self._decoder, self._params, rows, sampling, limits)

  def counts(self, rows: int, new: int, slots: int) -> dict[str, Any]:
    """Returns what the program does that reads some tokens and draws the next."""
    return counted_draw("jaxmoe", self._experiment, rows, new, slots)

  def seconds(self, prompts: list[list[int]], max_tokens: int) -> list[float]:
    """Returns the seconds of `write`."""
    return clocked(functools.partial(self.write, prompts, max_tokens))


def handlers() -> dict[str, Any]:
  """Returns what the side answers."""
  made: list[Any] = []

  def prepare(kind: str, shape: str, folder: str) -> dict[str, Any]:
    made.append({"step": OwnStep, "text": OwnText}[kind](shape, folder))
    return {}

  return {
    "prepare": prepare,
    "on_devices": on_devices,
    "sent": cut_rows.sent,
    "first": lambda: made[-1].first(),
    "steps": lambda number: made[-1].steps(number),
    "counts": lambda **fields: made[-1].counts(**fields),
    "write": lambda **fields: made[-1].write(**fields),
    "seconds": lambda **fields: made[-1].seconds(**fields),
  }
