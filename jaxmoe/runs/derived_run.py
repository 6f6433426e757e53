"""A run made of another one's state: read whole, carried over, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jaxmoe.adapt import Surgery, source_name, transplant_moments, transplant_params
from jaxmoe.checkpoint import Store, open_store
from jaxmoe.conversion.hf_files import FOLDER, TOKENIZER, carry
from jaxmoe.core import param_names
from jaxmoe.core.config_io import override, to_json
from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.core.layout import one_device
from jaxmoe.core.output import write_atomic
from jaxmoe.core.rng import Keys
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.tokenizers import load_tokenizer
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.models.pretrained.checkpoint import shapes_by_name
from jaxmoe.models.transformer import Decoder
from jaxmoe.optim import Constant
from jaxmoe.runs.recipe_loading import load_recipe, parse_changes
from jaxmoe.runs.run_loading import damage_line
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.run_log import RunLog
from jaxmoe.train.run_store import no_checkpoint
from jaxmoe.train.saver import make_record
from jaxmoe.train.train_state import PARAMS, State, StateSpec, came_from, read_state
from jaxmoe.train.trainer import Trainer
from jaxmoe.train.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class LoadedState:
  """The run that is operated on: its recipe, model, and newest intact state.

  Attributes:
    dtypes: Of the parameters there, by canonical name.
  """

  workdir: Workdir
  experiment: Experiment
  decoder: Decoder
  step: int
  state: State
  dtypes: dict[str, str]


def new_experiment(
  old: Experiment, surgery: Surgery, config: str | None, overrides: Sequence[str]
) -> Experiment:
  """Returns the recipe of the new run: of `config` or `old`, with the model of a surgery.

  Raises:
    InputError: a bad recipe or field, one that changes the shape of a parameter, or a pattern of
      `frozen` that names nothing in the new model.
  """
  recipe = load_recipe(config, []) if config else old
  new = override(dataclasses.replace(recipe, model=surgery.model), parse_changes(overrides))
  new.transform(new.decoder())  # its checks
  made = Decoder(surgery.model, old.data.tokenizer.vocab_size)
  if _named(new.decoder().shapes, new.decoder()) != _named(made.shapes, made):
    raise InputError(
      "the new recipe's tokenizer or --config.model fields change the shapes of parameters, which "
      "surgery does not; leave them as they are"
    )
  return new


def check_out(path: str | None, experiment: Experiment) -> pathlib.Path:
  """Returns the path of a folder that can be made.

  Raises:
    InputError: the flag is missing, something is there already, or it cannot be written.
  """
  if not path:
    raise InputError("--out is missing; give the folder of the new run, such as --out=runs/b")
  out = pathlib.Path(path)
  if os.path.lexists(out):
    raise InputError(f"--out={out}: is there already, and is not written over; give another folder")
  Workdir(out, "--out").check(experiment)
  return out


def check_moments(old: Experiment, new: Experiment, reset: bool) -> None:
  """Raises InputError if the new optimizer does not keep what the old one kept."""
  decoder = old.decoder()
  if not reset and _kept(old, decoder) != _kept(new, decoder):
    raise InputError(
      "optim.optimizer or optim.fairness keeps other numbers than the run's, which cannot follow; "
      "leave them, or start the optimizer anew (--reset_moments)"
    )


def read_source(
  workdir: Workdir, store: Store, corpus: Corpus, warn: Callable[[str], None] = print
) -> LoadedState:
  """Returns the newest intact state of a run; sets nothing aside, for the run may be alive.

  Raises:
    InputError: the corpus has another tokenizer than the run.
    CheckpointError: there is no intact checkpoint.
  """
  experiment = workdir.experiment()
  decoder = experiment.decoder()
  window = experiment.train.recovery.spike_window
  masters = came_from(store, experiment.masters(decoder))
  spec = StateSpec(decoder, experiment.transform(decoder), one_device(), window, masters)
  found = read_state(store, spec, damage_line(warn), set_aside=False)
  if found is None:
    raise no_checkpoint(workdir)
  step, arrays, _ = found
  if load_tokenizer(workdir.tokenizer).digest != corpus.tokenizer.digest:
    raise InputError(
      f"{workdir.path}: the run's tokenizer is another than the new recipe makes on this data; "
      "its ids would mean other text; use the run's own data, or a fixed tokenizer"
    )
  dtypes = {name.removeprefix(PARAMS): leaf.dtype.name for name, leaf in arrays.items()}
  return LoadedState(workdir, experiment, decoder, step, spec.from_arrays(arrays), dtypes)


def write_run(
  out: pathlib.Path,
  source: LoadedState,
  surgery: Surgery,
  experiment: Experiment,
  corpus: Corpus,
  event_fields: dict[str, Any],
  reset: bool = False,
) -> None:
  """Writes the workdir of the new run beside `out`, then renames it.

  Args:
    out: Where it comes to stand.
    source: The run that was operated on.
    surgery: What was done.
    experiment: The new recipe.
    corpus: Its documents.
    event_fields: What the event `surgery` says besides where the state is from.
    reset: Whether the optimizer starts anew.

  Raises:
    CheckpointError, InputError: the disk refuses it; nothing is left.
  """
  if (path := own_tokenizer(source.workdir, experiment)) is not None:
    corpus = corpus.with_tokenizer_at(str(out / path.relative_to(source.workdir.path)))
    experiment = dataclasses.replace(experiment, data=corpus.data)
  half = out.with_name(f".{out.name}.{os.getpid()}")
  workdir = Workdir(half)
  trainer = Trainer(experiment, workdir, corpus, one_device())
  spec = _spec(source, surgery, trainer)
  state = _carried(source, surgery, trainer, spec, reset)
  store = open_store(workdir.checkpoints, experiment.train.store)
  stream = corpus.stream(experiment.train.batch_size, experiment.train.seed)
  with contextlib.ExitStack() as cleanup:
    cleanup.callback(shutil.rmtree, half, ignore_errors=True)
    cleanup.callback(stream.close)
    cleanup.callback(store.close)
    try:
      half.mkdir(parents=True)
      write_atomic(workdir.config, to_json(experiment))
      corpus.tokenizer.save(workdir.tokenizer)
      carry(source.workdir.path, half)
      record = make_record(0, experiment, corpus, stream, 0)
      store.write(0, spec.to_arrays(state), record)
      store.close()
      log = RunLog(workdir.metrics, workdir.events)
      log.event("surgery", of=str(source.workdir.path), step=source.step, **event_fields)
      log.sync()
      half.rename(out)
    except CheckpointError as error:  # which names a folder that is gone
      raise CheckpointError(str(error).replace(str(half), str(out))) from None
    except OSError as error:
      raise InputError(
        f"--out={out}: cannot be written ({error.strerror}); choose another folder"
      ) from None


def own_tokenizer(workdir: Workdir, experiment: Experiment) -> pathlib.Path | None:
  """Returns the copy of a recipe's tokenizer.json that a run came with; None if it has none.

  The new run gets a copy, too, and must not need the run that it was made of.
  """
  tokenizer, path = experiment.data.tokenizer, workdir.path / FOLDER / TOKENIZER
  if not isinstance(tokenizer, TokenizerFile) or not path.is_file():
    return None
  return path if path.read_bytes() == pathlib.Path(tokenizer.path).read_bytes() else None


def _spec(source: LoadedState, surgery: Surgery, trainer: Trainer) -> StateSpec:
  """Returns the new run's, in which what is frozen has the dtype that the source has it in."""
  decoder, experiment = trainer.decoder, trainer.experiment
  origins = {name: source_name(surgery, name) for name in shapes_by_name(decoder)}
  came = {name: source.dtypes[old] for name, old in origins.items() if old in source.dtypes}
  masters = dataclasses.replace(trainer.spec.masters, came=came)
  window = experiment.train.recovery.spike_window
  return StateSpec(decoder, experiment.transform(decoder), trainer.layout, window, masters)


def _carried(
  source: LoadedState, surgery: Surgery, trainer: Trainer, spec: StateSpec, reset: bool
) -> State:
  """Returns the first state of the new run."""
  surgery = dataclasses.replace(surgery, model=trainer.experiment.model)
  new = trainer.decoder
  keys = Keys.from_seed(trainer.experiment.train.seed)
  params = transplant_params(surgery, source.decoder, new, source.state.params, keys)
  if reset:
    optimizer = jax.jit(trainer.experiment.transform(new).init)(params)
  else:
    like = spec.shapes.optimizer
    optimizer = _first_update(
      transplant_moments(surgery, source.decoder, new, source.state.optimizer, like)
    )
  window = trainer.experiment.train.recovery.spike_window
  return jax.device_put(State.create(spec.cast(params), optimizer, window), spec.shardings)


def _first_update(optimizer: Any) -> Any:
  """Returns the optimizer's state with the learning rate at the start of its schedule."""
  is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
  return jax.tree.map(
    lambda node: node._replace(count=node.count * 0) if is_schedule(node) else node,
    optimizer,
    is_leaf=is_schedule,
  )


def _kept(experiment: Experiment, decoder: Decoder) -> Any:
  """Returns the names, shapes and dtypes of what an optimizer keeps of a model."""
  optim = dataclasses.replace(experiment.optim, schedule=Constant(), frozen=())
  transform = dataclasses.replace(experiment, optim=optim).transform(decoder)
  return _named(jax.eval_shape(transform.init, decoder.shapes), decoder)


def _named(tree: Any, decoder: Decoder) -> dict[str, Any]:
  """Returns (shape, dtype) of every leaf by canonical name."""
  shapes: dict[str, Any] = {}
  for path, leaf in param_names.flatten(tree).items():
    several = param_names.layer_names(path, decoder.layer_groups)
    shape = leaf.shape[1:] if several else leaf.shape
    shapes.update(dict.fromkeys(several or [path], (shape, str(leaf.dtype))))
  return shapes
