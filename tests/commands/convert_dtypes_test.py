"""`launch.convert`: which dtype tensors and computing have, there, here and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxmoe.checkpoint import open_store
from jaxmoe.core.layout import one_device
from jaxmoe.train.workdir import Workdir
from tests.models.pretrained.checkpoint import bits, edit, tensors_of
from tests.models.pretrained.golden import FOLDER as GOLDEN


def test_a_dtype_that_is_asked_for_is_written(convert, checkpoint, tmp_path):
  there, run = checkpoint("deepseek_v3"), tmp_path / "run"
  result = convert(f"--from_hf={there}", f"--workdir={run}", "--file_dtype=bfloat16")
  assert "parameters in bfloat16; it computes in float32" in result.out
  back, half = tmp_path / "back", tmp_path / "half"
  wanted = {
    name: x if "correction_bias" in name else x.astype(jnp.bfloat16)
    for name, x in tensors_of(there).items()
  }
  convert(f"--workdir={run}", f"--to_hf={back}")
  assert bits(tensors_of(back)) == bits(wanted)
  convert(f"--workdir={run}", f"--to_hf={half}", "--dtype=float16")  # an older name
  wanted = {
    name: x if "correction_bias" in name else x.astype(np.float16) for name, x in wanted.items()
  }
  assert bits(tensors_of(half)) == bits(wanted)
  for folder, dtype in ((back, "bfloat16"), (half, "float16")):
    config = json.loads((folder / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"]) == (dtype, dtype)


def train_by_hand(run, move):
  """Saves a step in which parameters are float32 and were moved, as masters are."""
  store = open_store(run / "checkpoints")
  whole = one_device().replicated
  like = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    for name, x in store.contents(0).items()
  }
  arrays, record = store.read(0, like)
  moved = {name: jnp.asarray(move(np.asarray(x, np.float32))) for name, x in arrays.items()}
  store.write(1, moved, {**record, "step": 1})
  store.close()
  return {name: np.asarray(x) for name, x in moved.items()}


def test_what_was_trained_is_rounded_to_what_it_was_and_that_is_told(convert, checkpoint, here,
                                                                      tmp_path):  # fmt: skip
  there, run = checkpoint("llama", "bfloat16"), tmp_path / "run"
  convert(f"--from_hf={there}", f"--workdir={run}")
  moved = train_by_hand(run, lambda x: x * np.float32(1.0007))
  table, own = "model.embed_tokens.weight", moved["params/embed/table"]
  result = convert(f"--workdir={run}", f"--to_hf={tmp_path / 'own'}")
  changed = sum(int((x != x.astype(jnp.bfloat16)).sum()) for x in moved.values())
  assert f"note: rounded {changed:,} values to bfloat16, which the checkpoint" in result.out
  written = tensors_of(tmp_path / "own")
  assert {x.dtype.name for x in written.values()} == {"bfloat16"}
  assert written[table].tobytes() == own.astype(jnp.bfloat16).tobytes()
  result = convert(f"--workdir={run}", f"--to_hf={tmp_path / 'all'}", "--file_dtype=float32")
  assert "rounded" not in result.out
  assert tensors_of(tmp_path / "all")[table].tobytes() == own.tobytes()


def test_a_number_that_its_dtype_cannot_hold_is_refused(convert, checkpoint, here, tmp_path):
  there, run = checkpoint("llama", "float16"), tmp_path / "run"
  convert(f"--from_hf={there}", f"--workdir={run}")
  train_by_hand(run, lambda x: x * np.float32(1e6))
  result = here("convert", f"--workdir={run}", f"--to_hf={tmp_path / 'out'}")
  assert result.code == 2 and result.err.count("\n") == 1, result
  assert "numbers that float16 cannot hold; write it with --file_dtype=float32" in result.err
  assert not (tmp_path / "out").exists()


def test_a_run_of_before_its_dtypes_were_kept_is_written_in_that_of_its_file(convert, checkpoint,
                                                                             tmp_path):  # fmt: skip
  run, back = tmp_path / "run", tmp_path / "back"
  convert(f"--from_hf={checkpoint('llama', 'float16')}", f"--workdir={run}")
  (run / "pretrained" / "dtypes.json").unlink()
  convert(f"--workdir={run}", f"--to_hf={back}")
  assert {x.dtype.name for x in tensors_of(back).values()} == {"float32"}
  assert json.loads((back / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_bfloat16_file_computes_in_float32_where_that_is_asked_for(convert, checkpoint, here,
                                                                     tmp_path):  # fmt: skip
  there, exact = checkpoint("mixtral", "bfloat16"), checkpoint("mixtral", name="as_float32")
  whole = {name: x.astype(np.float32) for name, x in tensors_of(there).items()}
  safetensors.numpy.save_file(whole, exact / "model.safetensors", metadata={"format": "pt"})
  ids = safetensors.numpy.load_file(GOLDEN / "mixtral" / "expected.safetensors")["ids"]
  np.save(tmp_path / "ids.npy", ids)
  logits = {}
  for name, folder, flags in (
    ("exact", exact, ()), ("float32", there, ("--compute_dtype=float32",)), ("its own", there, ()),
  ):  # fmt: skip
    run, out = tmp_path / name, tmp_path / f"{name}.npz"
    convert(f"--from_hf={folder}", f"--workdir={run}", *flags)
    asked = (f"--ids={tmp_path / 'ids.npy'}", f"--out={out}", "--logits")
    assert here("score", f"--workdir={run}", *asked).code == 0
    logits[name] = np.load(out)["logits"]
  np.testing.assert_allclose(logits["float32"], logits["exact"], atol=2e-4, rtol=1e-4)
  assert np.abs(logits["its own"] - logits["exact"]).max() > 0.02, "in bfloat16"
  models = [Workdir(tmp_path / name).experiment().model for name in logits]
  assert [(model.param_dtype, model.dtype) for model in models] == [
    ("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")
  ]  # fmt: skip


def test_what_surgery_makes_of_a_converted_run_knows_what_it_came_from(convert, checkpoint, here,
                                                                       text, tmp_path):  # fmt: skip
  there, run, out = checkpoint("mixtral", "bfloat16"), tmp_path / "run", tmp_path / "out"
  edit(there, unread_key="kept")
  convert(f"--from_hf={there}", f"--workdir={run}", f"--text={text}",
          "--config.data.held_out=0.3", "--config.data.seq_len=32")  # fmt: skip
  result = here("surgery", f"--workdir={run}", f"--out={out}", "--clone=2", "--reset_moments")
  assert result.code == 0, result
  convert(f"--workdir={out}", f"--to_hf={tmp_path / 'back'}")
  tensors, back = tensors_of(there), tensors_of(tmp_path / "back")
  assert {x.dtype.name for x in back.values()} == {"bfloat16"}
  expert = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
  same = [at for at in range(8) if (back[expert.format(at)] == tensors[expert.format(0)]).all()]
  assert len(same) == 2
  names = ("config.json", "tokenizer.json")
  before, after = ([(at / name).read_text() for name in names] for at in (there, tmp_path / "back"))
  assert after[1] == before[1]
  before, after = json.loads(before[0]), json.loads(after[0])
  changed = {"num_local_experts": 8, "num_experts_per_tok": 4}
  assert {key: after[key] for key in before} == {**before, **changed}
