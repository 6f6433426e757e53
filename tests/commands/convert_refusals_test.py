"""`launch.convert`: what is not understood or not whole is refused in one line; nothing is left."""

import json

import numpy as np
import pytest
import safetensors.numpy

from jaxmoe.models.pretrained.checkpoint import Checkpoint
from tests.models.pretrained.checkpoint import edit, tensors_of

ONE_LINE = "error: "


@pytest.fixture
def refused(here, tmp_path):
  """Asserts that a conversion is refused with one line, and that nothing is left."""

  def run(folder, *words, flags=()):
    before = sorted(tmp_path.rglob("*"))
    result = here("convert", f"--from_hf={folder}", f"--workdir={tmp_path / 'run'}", *flags)
    assert result.code == 2, result
    assert result.err.startswith(ONE_LINE) and result.err.count("\n") == 1
    for word in words:
      assert word in result.err
    assert sorted(tmp_path.rglob("*")) == before

  return run


def test_what_fails_on_the_way_leaves_nothing(refused, checkpoint, monkeypatch):
  gather, calls = Checkpoint.gather, []

  def fail(self, bound, form):
    calls.append(bound.name)
    if len(calls) == 5:
      raise OSError(28, "No space left on device")
    return gather(self, bound, form)

  monkeypatch.setattr(Checkpoint, "gather", fail)
  refused(checkpoint("llama"), "No space left on device")
  assert len(calls) == 5


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model_type": "bert"}, ("model_type='bert' is not known", "mixtral")),
    ({"hidden_act": "gelu"}, ("hidden_act='gelu' is not known",)),
    ({"auto_map": {"AutoModel": "x.py"}}, ("auto_map names code", "never run")),
    ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config (fp8)",)),
    ({"rope_parameters": {"rope_type": "wavy"}}, ("rope_type='wavy' is not known",)),
    ({"rope_parameters": {"rope_type": "linear"}}, ("a rope linear needs factor",)),
    ({"mlp_bias": True}, ("mlp_bias=True is not known",)),
    ({"hidden_size": 8}, ("has the shape", "config.json asks for")),
    ({"num_hidden_layers": 3}, ("tensors are missing: model.layers.2.", "more")),
    ({"num_hidden_layers": 1}, ("tensors are left over: model.layers.1.", "more")),
    ({"num_hidden_layers": "2"}, ("num_hidden_layers='2' is no int",)),
    ({"num_hidden_layers": 0}, ("num_hidden_layers=0 must be at least 1",)),
    ({"vocab_size": None}, ("has no vocab_size",)),
    ({"eos_token_id": 99}, ("no token of the id 99", "--eod=TOKEN")),
    ({"num_key_value_heads": 3}, ("num_heads must be a multiple of num_kv_heads",)),
  ],
)
def test_a_config_that_is_not_understood_is_refused(refused, checkpoint, changes, words):
  folder = checkpoint("llama")
  edit(folder, **changes)
  refused(folder, *words)


def drop_weights(folder):
  (folder / "model.safetensors").unlink()


def pickled(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])


def escaping(folder):
  index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def listed_wrong(folder):
  index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def of_ints(folder):
  tensors = tensors_of(folder)
  tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
  ("spoil", "words"),
  [
    (drop_weights, ("(there is none); save the checkpoint as safetensors",)),
    (pickled, ("pytorch_model.bin: no whole file of torch.save",)),
    (truncated, ("not a whole safetensors file",)),
    (escaping, ("no file beside it; not opened",)),
    (listed_wrong, ("holds other tensors than", "more")),
    (of_ints, ("model.norm.weight is I32",)),
    (lambda folder: (folder / "tokenizer.json").unlink(), ("tokenizer.json: no such file",)),
    (lambda folder: (folder / "config.json").unlink(), ("config.json: no such file",)),
    (lambda folder: (folder / "config.json").write_text("[1"), ("cannot be read",)),
    (lambda folder: (folder / "config.json").write_text("[]"), ("holds no object",)),
  ],
)
def test_files_that_are_not_whole_are_refused(refused, checkpoint, spoil, words):
  folder = checkpoint("llama")
  spoil(folder)
  refused(folder, *words)


def test_a_tied_head_that_is_written_too_is_read_if_it_is_the_table(checkpoint, refused, convert,
                                                                    tmp_path):  # fmt: skip
  folder = checkpoint("llama")
  edit(folder, tie_word_embeddings=True)
  refused(folder, "left over: lm_head.weight")
  tensors = tensors_of(folder)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  convert(f"--from_hf={folder}", f"--workdir={tmp_path / 'run'}")


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ((), ("give one of --from_checkpoint=FOLDER and --to_hf=FOLDER",)),
    (("--from_hf=a", "--to_hf=b"), ("give one of",)),
    (("--from_hf=a", "--shard_gb=1"), ("--shard_gb goes with the other direction",)),
    (("--to_hf=a", "--text=b"), ("--text goes with the other direction",)),
    (("--to_hf=a", "--config.train.seed=1"), ("config.train.seed=1 goes with the other",)),
    (("--to_hf=a", "--shard_gb=-1"), ("--shard_gb=-1.0 must be above 0",)),
    (("--from_hf=a", "--file_dtype=float16"), ("--file_dtype=float16 is for --to_hf",)),
    (("--from_hf=a", "--dtype=float32"), ("--file_dtype", "--compute_dtype")),
    (("--to_hf=a", "--dtype=float32", "--file_dtype=float32"), ("--dtype: of what?",)),
    (("--to_hf=a", "--compute_dtype=float32"), ("--compute_dtype goes with the other",)),
  ],
)
def test_flags_that_do_not_fit_each_other_are_refused(here, tmp_path, flags, words):
  result = here("convert", f"--workdir={tmp_path / 'run'}", *flags)
  assert result.code == 2 and all(word in result.err for word in words), result
  assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_written_over(here, checkpoint, tmp_path):
  folder = checkpoint("llama")
  result = here("convert", f"--from_hf={folder}", f"--workdir={folder}")
  assert result.code == 2 and "is there already" in result.err
  result = here("convert", f"--workdir={tmp_path / 'none'}", f"--to_hf={folder}")
  assert result.code == 2 and "is there already" in result.err
