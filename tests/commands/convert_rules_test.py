"""Files of devices become the run of their whole, by rules; what does not fit is one line."""

import json

import numpy as np
import pytest
import safetensors.numpy

from tests.checkpoint.torch_zip import save_arrays
from tests.models.pretrained.checkpoint import bits, tensors_of

RULES = {"axes": {"tensor": 2}, "rules": {"tensor": [
  {"pattern": ".*norm.weight|.*gate.weight", "kind": "replicate"},
  {"pattern": ".*(embed_tokens|lm_head).weight", "kind": "fragment", "pad": 61},
  {"pattern": ".*([qkv]_proj|w[13]).weight", "kind": "fragment"},
  {"pattern": ".*(o_proj|w2).weight", "kind": "fragment", "dim": 1},
]}}  # fmt: skip


def cut(name, x, device):
  """The part of one of two devices, by slices that are written out."""
  if "norm" in name or name.endswith("gate.weight"):
    return x
  if name.endswith(("o_proj.weight", "w2.weight")):
    return np.ascontiguousarray(np.split(x, 2, 1)[device])
  if "embed_tokens" in name or "lm_head" in name:
    x = np.concatenate([x, np.ones((1, x.shape[1]), x.dtype)])
  return np.split(x, 2)[device]


@pytest.fixture
def devices(checkpoint, tmp_path):
  """A folder with files of two devices, the whole, and the file of rules."""
  folder = checkpoint("mixtral")
  whole = tensors_of(folder)
  (folder / "model.safetensors").unlink()
  for device in range(2):
    part = {name: cut(name, x, device) for name, x in whole.items()}
    safetensors.numpy.save_file(part, folder / f"rank_{device}.safetensors")
  (tmp_path / "rules.json").write_text(json.dumps(RULES))
  return folder, whole, tmp_path / "rules.json"


@pytest.mark.parametrize("suffix", ("safetensors", "pth"))
def test_the_whole_comes_out(convert, devices, tmp_path, suffix):
  folder, whole, rules = devices
  for path in folder.glob("rank_*") if suffix == "pth" else ():
    save_arrays(path.with_suffix(".pth"), safetensors.numpy.load_file(path))
    path.unlink()
  convert(f"--from_checkpoint={folder}", f"--workdir={tmp_path / 'run'}", f"--rules={rules}")
  convert(f"--workdir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'back'}")
  assert bits(tensors_of(tmp_path / "back")) == bits(whole)


def of_rules(change):
  """Spoils a folder by a change of its rules."""

  def spoil(folder, rules):
    plain = json.loads(rules.read_text())
    change(plain["rules"]["tensor"], plain)
    rules.write_text(json.dumps(plain))

  return spoil


def differ(folder, rules):
  path = folder / "rank_1.safetensors"
  part = safetensors.numpy.load_file(path)
  part["model.norm.weight"] += 1
  safetensors.numpy.save_file(part, path)


SPOILED = {
  "unused": (of_rules(lambda of, _: of.append({"pattern": "x", "kind": "unique"})), "no tensor"),
  "ambiguous": (of_rules(lambda of, _: of.append({"pattern": ".*", "kind": "unique"})), "and '.*'"),
  "without": (of_rules(lambda of, _: of.pop()), "no rule along tensor"),
  "padding": (of_rules(lambda of, _: of[1].pop("pad")), "has the shape [62, 16]"),
  "dim": (of_rules(lambda of, _: of[3].update(dim=0)), "has the shape"),
  "field": (of_rules(lambda of, _: of[0].update(axis=0)), "a rule with axis"),
  "text": (of_rules(lambda of, _: of[1].update(pad="61")), "a rule {"),
  "axes": (of_rules(lambda _, plain: plain["axes"].update(tensor=4)), "2 devices wrote parts"),
  "no json": (lambda folder, rules: rules.write_text("[1"), "no axes and rules"),
  "gone": (lambda folder, rules: (folder / "rank_0.safetensors").unlink(), "1 devices"),
  "copies": (differ, "model.norm.weight: copies 0 and 1 differ"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_what_does_not_fit_is_one_line(here, devices, tmp_path, name):
  folder, _, rules = devices
  spoil, words = SPOILED[name]
  spoil(folder, rules)
  flags = (f"--workdir={tmp_path / 'run'}", f"--rules={rules}")
  result = here("convert", f"--from_checkpoint={folder}", *flags)
  assert result.code == 2 and words in result.err and result.err.count("\n") == 1, result
  assert not (tmp_path / "run").exists()
