"""A run in the hands of Python: it writes, chats, scores, is changed, trained on and exported.

No process-wide setting is made, nothing is printed but what is asked for and, by `fit`, its
progress; a mistake is an InputError of one line.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmoe.conversion.hf_export import params_to_hf, to_hf
from jaxmoe.conversion.hf_import import ImportOptions, from_hf, load_model
from jaxmoe.core.config_io import as_begun
from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import read_documents
from jaxmoe.data.sources.mixed_files import sources_of
from jaxmoe.models.generate import Sampling
from jaxmoe.models.transformer import DType
from jaxmoe.report import write_report
from jaxmoe.runs import surgery
from jaxmoe.runs.arguments import Path, as_count, as_ids, as_path, as_sampling
from jaxmoe.runs.chat_prompt import prompt_format
from jaxmoe.runs.evaluation import held_out, score_documents
from jaxmoe.runs.fit import StepCallback, check_run, train_run
from jaxmoe.runs.generation import (
  Messages,
  TextStream,
  encode_chat,
  encode_prompts,
  generate_text,
)
from jaxmoe.runs.run_loading import LoadedRun, nothing, read_run
from jaxmoe.runs.scoring import Scores, check_ids, score_ids
from jaxmoe.train.chat_date import settle_chat_date
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.held_table import hold_table
from jaxmoe.train.routing_record import check_choices, experts_by_depth
from jaxmoe.train.run_options import RunOptions
from jaxmoe.train.workdir import Workdir


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run(LoadedRun):
  """A trained model with its recipe and tokenizer; made by `jaxmoe.open` and the like."""

  def __repr__(self) -> str:
    return f"Run({self.name!r}, step={self.step}, params={self.decoder.num_params:,})"

  def generate(
    self,
    prompts: str | Sequence[str],
    *,
    stream: bool | None = None,
    special: bool = False,
    **sampling: Any,
  ) -> list[str]:
    """Returns what the model writes after each prompt.

    Args:
      prompts: Texts to continue.
      stream: Whether text is shown as it is written; None for where a person watches, in a notebook
        or an interactive Python.
      special: Whether special tokens are shown.
      **sampling: `max_tokens`, `temperature`, `top_p` and `seed`.

    Raises:
      InputError: a prompt that is empty or leaves no room, or a setting out of range.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = encode_prompts(self.tokenizer, texts, self.experiment.data.seq_len)
    return self._write(texts, rows, as_sampling(sampling), stream, special)

  def chat(
    self, messages: Messages, *, stream: bool | None = None, special: bool = False, **sampling: Any
  ) -> str:
    """Returns what the assistant says after messages, in the format that the run was trained in.

    Args:
      messages: (role, content) of each.
      stream: As of `generate`.
      special: As of `generate`.
      **sampling: As of `generate`.

    Raises:
      InputError: no format is known, a message is empty, or they leave no room.
    """
    asked = prompt_format(self.origin.folder, self.experiment, self.origin.trained)
    row = encode_chat(self.tokenizer, asked, messages, self.experiment.data.seq_len)
    return self._write([""], [row], as_sampling(sampling), stream, special)[0]

  def evaluate(self, text: Path | None = None, *, batch_size: int = 16) -> dict[str, Any]:
    """Returns bits per byte, of all and by domain, beside those of compressors.

    Args:
      text: Files to score; None for what the run holds out.
      batch_size: The most rows scored at a time.

    Raises:
      InputError: nothing is there to score, or what is held out may have been trained on.
    """
    if as_count(batch_size, "batch_size") < 1:
      raise InputError(f"{batch_size=} must be at least 1")
    if text is None:
      return score_documents(self, held_out(self, None, nothing), batch_size)
    sources, without = sources_of(as_path(text, "text"))
    documents, skipped = read_documents(sources, self.experiment.data, self.tokenizer, nothing)
    scores = score_documents(self, documents, batch_size)
    return {**scores, "skipped": skipped, "without_text": without}

  def score(
    self,
    ids: Any,
    *,
    routing: Any = None,
    return_routing: bool = False,
    return_logits: bool = False,
  ) -> Scores:
    """Returns the log probability of each next id of rows (B, L).

    Args:
      ids: Integers.
      routing: Choices to take in place of the routers' own, as `return_routing` gave them: the
        same weights then give the same scores, bit for bit.
      return_routing: Whether the choices are returned, too.
      return_logits: Whether logits are.

    Raises:
      InputError: another shape, an id outside the vocabulary, or choices that do not fit.
    """
    ids_BL, model = as_ids(ids), self.experiment.model
    vocab_size = self.experiment.data.tokenizer.vocab_size
    check_ids(ids_BL, vocab_size, self.experiment.data.seq_len, "ids")
    if (return_routing or routing is not None) and not any(experts_by_depth(model)):
      raise InputError("routing: the model has no experts; leave it out")
    if routing is not None:
      routing = np.asarray(routing)
      check_choices(routing, model, ids_BL, "routing")
    return score_ids(self, ids_BL, routing, return_routing, return_logits)

  def save_pretrained(self, path: Path, *, dtype: str | None = None) -> None:
    """Writes the model as a checkpoint that transformers loads.

    Args:
      path: The folder; must not exist.
      dtype: Of the tensors; None for their own.

    Raises:
      InputError: no public family has such a model, or the folder cannot be written.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
      raise InputError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
    if self.workdir is None:
      params_to_hf(self.experiment, self.params, self.origin, as_path(path, "path"), dtype)
    else:
      to_hf(self.workdir, as_path(path, "path"), dtype, say=nothing, warn=_warn)

  def insert(self, num: int, like: Sequence[int] = ()) -> DerivedRun:
    """Returns the run with `num` inactive experts more a layer; outputs stay, bit for bit."""
    return self._derived(surgery.inserting(as_count(num, "num"), like))

  def open_experts(self, like: Sequence[int] = ()) -> DerivedRun:
    """Returns the run with its inactive experts opened to the router."""
    return self._derived(surgery.opening(like))

  def prune(
    self, keep: int, *, usage: Any = None, count_on: int | None = None, held_out: bool = False
  ) -> DerivedRun:
    """Returns the run with the most used experts of each layer, by `usage` or counted."""
    counts = None if usage is None else [np.asarray(row, np.float64) for row in usage]
    return self._derived(surgery.pruning(as_count(keep, "keep"), counts, count_on, held_out))

  def clone(self, times: int) -> DerivedRun:
    """Returns the run with every expert so many times; outputs stay."""
    return self._derived(surgery.cloning(as_count(times, "times")))

  def upcycle(
    self, num_experts: int, num_active: int = 2, *, noise: float = 0.0, drop: float = 0.0
  ) -> DerivedRun:
    """Returns the run with a MoE layer in place of every dense block, each expert a copy."""
    experts, active = as_count(num_experts, "num_experts"), as_count(num_active, "num_active")
    return self._derived(surgery.upcycling(experts, active, noise, drop))

  def _derived(self, operation: surgery.Operation) -> DerivedRun:
    if self.workdir is None:
      raise InputError(
        f"{self.name}: surgery needs a run in a folder; make one with "
        f"jaxmoe convert --from_hf={self.name} --workdir=DIR, and open that"
      )
    return DerivedRun(self.workdir, operation)

  def _write(
    self,
    prompts: list[str],
    rows: list[np.ndarray],
    sampling: Sampling,
    stream: bool | None,
    special: bool,
  ) -> list[str]:
    if not (_is_watched() if stream is None else stream):
      return generate_text(self, rows, sampling, nothing, special)
    shown = TextStream(self.tokenizer, prompts, _show, special)
    texts = generate_text(self, rows, sampling, shown.token, special)
    shown.finish()
    return texts


@dataclasses.dataclass(frozen=True)
class DerivedRun:
  """A run after surgery, which is done when it is saved."""

  workdir: Workdir
  operation: surgery.Operation

  def save(
    self,
    path: Path,
    *,
    config: str | None = None,
    changes: Sequence[str] = (),
    reset_moments: bool = False,
  ) -> Run:
    """Writes the new run at step 0, whole or not at all, and opens it.

    Args:
      path: The folder; must not exist.
      config: A recipe for all but the model; None for the run's.
      changes: Of its fields, such as `train.num_steps=100`.
      reset_moments: Whether its optimizer starts anew.

    Raises:
      InputError: the operation does not fit the model, or the folder cannot be written.
    """
    new_run = surgery.NewRun(config, [f"--config.{change}" for change in changes], reset_moments)
    out = as_path(path, "path")
    surgery.derive(self.workdir, self.operation, out, new_run, None, nothing, _warn)
    return open_run(path)


def open_run(path: Path) -> Run:
  """Returns the newest intact state of the run in a folder.

  The folder may be that of a run that is alive; nothing in it is changed.

  Raises:
    InputError: there is no run, or no checkpoint yet.
    CheckpointError: no checkpoint is intact.
  """
  return Run(**_fields(read_run(Workdir(as_path(path, "path")), warn=_warn)))


def from_pretrained(
  path: Path, *, dtype: DType | None = None, compute_dtype: DType | None = None
) -> Run:
  """Returns the model in the folder of a public checkpoint; writes nothing.

  Args:
    path: Of config.json, safetensors and tokenizer.json, as transformers writes them.
    dtype: What parameters become; None for what they are.
    compute_dtype: What the model computes in; None for what fits the checkpoint.

  Raises:
    InputError: a checkpoint that is not known or not whole.
  """
  options = ImportOptions(compute_dtype=compute_dtype, param_dtype=dtype)
  model = load_model(as_path(path, "path"), options, _warn)
  decoder = model.experiment.decoder()
  return Run(None, model.experiment, decoder, model.tokenizer, 0, model.params, model.origin, None)


def convert(path: Path, workdir: Path, **options: Any) -> Run:
  """Writes the run of a public checkpoint, as `from_hf` does, and opens it; see `ImportOptions`.

  Raises:
    InputError: a checkpoint that is not known or not whole, or a folder that is there already.
  """
  folder = Workdir(as_path(workdir, "workdir"))
  from_hf(as_path(path, "path"), folder, ImportOptions(**options), nothing)
  return open_run(workdir)


def fit(
  experiment: Experiment,
  workdir: Path,
  *,
  on_step: Callable[[dict[str, Any]], Any] | None = None,
  allow_unproven: bool = False,
) -> Run:
  """Trains a recipe in a folder to its last step, or goes on there, and opens the run.

  Args:
    experiment: The recipe, see `jaxmoe.recipe`.
    workdir: The folder; empty, or of the same run.
    on_step: Called with the line of metrics.jsonl of each step.
    allow_unproven: Whether a layout need not have been shown equal to one device.

  Raises:
    InputError: a recipe that does not fit the folder, the data or the devices.
    UserFacingError: training ended early; its class says why.
  """
  if not isinstance(experiment, Experiment):
    raise InputError(f"{experiment!r} is no recipe; give jaxmoe.recipe(NAME)")
  folder = Workdir(as_path(workdir, "workdir"))
  begun = folder.begun()
  kept = as_begun(experiment, begun) if begun else experiment
  settled = settle_chat_date(hold_table(kept), begun)
  options = RunOptions(listeners=(StepCallback(on_step),) if on_step else ())
  try:
    check_run(settled, folder, allow_unproven, print)
    train_run(settled, folder, options, lambda: False, None, print)
  finally:
    folder.release()
  write_report(folder.path)
  return open_run(workdir)


def _fields(record: Any) -> dict[str, Any]:
  return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _is_watched() -> bool:
  """Whether this is a notebook or an interactive Python."""
  return hasattr(sys, "ps1")


def _show(text: str) -> None:
  print(text, end="", flush=True)


def _warn(line: str) -> None:
  warnings.warn(line, stacklevel=3)
