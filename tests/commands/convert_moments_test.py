"""Folders with Adam's moments become runs at their step; what does not fit is one line."""

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import open_store
from jaxmoe.core.config_io import from_plain
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.checkpoint import open_checkpoint
from jaxmoe.train.experiment import Experiment
from tests.checkpoint.dcp_folder import Entry, save_folder
from tests.checkpoint.torch_zip import Stored, View, save
from tests.models.pretrained.checkpoint import tensors_of

MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}
STEP = 7


@pytest.fixture
def tensors(checkpoint):
  """A folder without its weights, and these with moments of random numbers."""
  folder = checkpoint("mixtral")
  weights, rng = tensors_of(folder), np.random.default_rng(0)
  (folder / "model.safetensors").unlink()
  kept = {
    moment: {name: rng.random(x.shape, np.float32) for name, x in weights.items()}
    for moment in MOMENTS
  }
  return folder, weights, kept


def write_dcp(folder, weights, kept, steps=(STEP,), without=()):
  """Writes what torch.distributed.checkpoint does of a model and its flattened optimizer."""
  entries = {f"model.{name}": Entry(x, whole(x)) for name, x in weights.items()}
  for at, name in enumerate(weights):
    count = np.float32(steps[at % len(steps)])
    entries[f"optimizer.state.{name}.step"] = Entry(count, {(): ()})
    for moment in MOMENTS:
      x = kept[moment][name]
      entries[f"optimizer.state.{name}.{moment}"] = Entry(x, whole(x))
  save_folder(folder, {name: of for name, of in entries.items() if name not in without})


def whole(x):
  """One chunk of all."""
  return {(0,) * x.ndim: x.shape}


def write_zero(folder, weights, kept, steps=(STEP, STEP)):
  """Writes what DeepSpeed's stage 1 does of one group over two processes, with padding."""
  names, ranks = list(weights), 2
  extra = sum(weights[name].size for name in names) % 2

  def parts(of):
    flat = np.concatenate([of[name].ravel() for name in names] + [np.zeros(extra, np.float32)])
    return np.split(flat.astype(np.float32), ranks)

  masters, moments = parts(weights), {moment: parts(kept[moment]) for moment in MOMENTS}
  for rank in range(ranks):
    views = {of: View(Stored(moments[of][rank], of)) for of in MOMENTS}
    state = {**views, "step": steps[rank]}
    groups = [{"betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.03}]
    save(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": {
      "zero_stage": 1, "base_optimizer_state": {"state": {0: state}, "param_groups": groups},
      "single_partition_of_fp32_groups": [View(Stored(masters[rank], "w"))],
    }})  # fmt: skip
  shapes = [{name: tuple(weights[name].shape) for name in names}]
  save(folder / "mp_rank_00_model_states.pt", {"param_shapes": shapes, "skipped_steps": 1})


def write_universal(folder, weights, kept):
  """Writes what DeepSpeed makes of its stage 1: a folder for each parameter."""
  groups = [{"betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.03}]
  for name, x in weights.items():
    atom = folder / "zero" / name
    atom.mkdir(parents=True)
    for file, of in {"fp32": x, **{moment: kept[moment][name] for moment in MOMENTS}}.items():
      save(atom / f"{file}.pt", {"cat_dim": 0, "param": View(Stored(of, "0"))})
    save(atom / "step.pt", View(Stored(np.float32([STEP]), "0"), ()))
  save(folder / "zero" / "optimizer_state.pt", {"param_groups": groups})
  shapes = [{name: tuple(x.shape) for name, x in weights.items()}]
  save(folder / "mp_rank_00_model_states.pt", {"param_shapes": shapes, "skipped_steps": 1})


def arrays_of(workdir, step):
  """All arrays and the record of a step, without values made of them."""
  store = open_store(workdir / "checkpoints")
  assert list(store.steps()) == [step]
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = {
    name: jax.ShapeDtypeStruct(of.shape, of.dtype, sharding=one)
    for name, of in store.contents(step).items()
  }
  arrays, record = store.read(step, like)
  return {name: np.asarray(x) for name, x in arrays.items()}, record


def check_moments(folder, found, kept):
  """Each moment is that of its parameter, moved as the parameter is, bit for bit."""
  checkpoint = open_checkpoint(FAMILIES, folder)
  for bound, layout in checkpoint.weights:
    for moment, ours in MOMENTS.items():
      true = bound.gather(layout, kept[moment].__getitem__)
      assert found[f"optimizer/1/{ours}/{bound.name}"].tobytes() == true.tobytes(), bound.name


@pytest.mark.parametrize(
  ("write", "skipped"), [(write_dcp, 0), (write_zero, 1), (write_universal, 1)],
  ids=("dcp", "zero", "universal"),
)  # fmt: skip
def test_a_run_at_its_step_comes_out(convert, tensors, tmp_path, write, skipped):
  folder, weights, kept = tensors
  write(folder, weights, kept)
  done = convert(f"--from_checkpoint={folder}", f"--workdir={tmp_path / 'run'}")
  assert f"at step {STEP + skipped} with Adam's moments of {STEP} updates" in done.out
  assert "not carried over: the learning rate" in done.out
  found, record = arrays_of(tmp_path / "run", STEP + skipped)
  check_moments(folder, found, kept)
  counts = {name: int(found[name]) for name in ("step", "skipped", "in_a_row", "unlabelled")}
  assert counts == {"step": STEP + skipped, "skipped": skipped, "in_a_row": 0, "unlabelled": 0}
  assert found["optimizer/1/count"] == found["optimizer/3/count"] == STEP
  adam = from_plain(Experiment, record["config"]).optim.optimizer
  set_to = (adam.b1, adam.b2, adam.eps, adam.weight_decay)
  assert set_to == ((0.8, 0.99, 1e-7, 0.03) if skipped else (0.9, 0.95, 1e-8, 0.1))


def test_it_is_trained_on_from_there(convert, here, tensors, text, tmp_path):
  folder, weights, kept = tensors
  write_dcp(folder, weights, kept)
  flags = (f"--workdir={tmp_path / 'run'}", f"--text={text}", "--config.data.seq_len=16")
  convert(f"--from_checkpoint={folder}", *flags, f"--config.train.num_steps={STEP + 2}",
          "--config.optim.schedule.warmup_steps=1", "--config.train.batch_size=2",
          "--config.samples.every=0", "--config.data.held_out=0.2")  # fmt: skip
  result = here("train", f"--config={tmp_path / 'run' / 'config.json'}", flags[0])
  assert result.code == 0, result
  assert f"going on from step {STEP}" in result.out
  assert STEP + 2 in open_store(tmp_path / "run" / "checkpoints").steps()


def test_weights_alone_begin_at_step_0(convert, tensors, tmp_path):
  folder, weights, kept = tensors
  write_zero(folder, weights, kept)
  convert(f"--from_hf={folder}", f"--workdir={tmp_path / 'run'}", "--weights_only")
  found, _ = arrays_of(tmp_path / "run", 0)
  assert all(name.startswith("params/") for name in found)


@pytest.mark.parametrize(
  ("spoil", "flags", "words"),
  [
    (lambda *of: write_dcp(*of, steps=(STEP, STEP + 1)), (), "is not one for all"),
    (lambda *of: write_zero(*of, steps=(STEP, STEP + 1)), (), "parts of different steps"),
    (lambda *of: write_dcp(*of, without=("optimizer.state.model.norm.weight.exp_avg",)), (),
     "no optimizer.state.model.norm.weight.exp_avg"),
    (write_dcp, ("--config.train.num_steps=5", "--config.optim.schedule.warmup_steps=1"),
     "--config.train.num_steps above it"),
    (write_dcp, ("--config=configs/tiny.py:optimizer=lion",), "the moments are Adam's"),
    (lambda *of: (write_dcp(*of), write_zero(*of)), (), "two kinds, .metadata and"),
  ],
  ids=("steps", "zero steps", "missing", "length", "optimizer", "two kinds"),
)  # fmt: skip
def test_what_does_not_fit_is_one_line(here, tensors, tmp_path, spoil, flags, words):
  folder, weights, kept = tensors
  spoil(folder, weights, kept)
  before = sorted(tmp_path.rglob("*"))
  result = here("convert", f"--from_checkpoint={folder}", f"--workdir={tmp_path / 'run'}", *flags)
  assert result.code == 2 and words in result.err and result.err.count("\n") == 1, result
  assert sorted(tmp_path.rglob("*")) == before


def test_both_names_of_a_folder_are_refused(here, tmp_path):
  result = here("convert", "--from_checkpoint=a", "--from_hf=a", f"--workdir={tmp_path / 'run'}")
  assert result.code == 2 and "give one of the two" in result.err
