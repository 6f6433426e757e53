"""`launch.oracle` on a run whose layers send a token to one of two experts."""

import dataclasses
import json

import numpy as np
import pytest

from jaxmoe.checkpoint import open_store
from jaxmoe.core.config_io import to_json
from jaxmoe.core.layout import one_device
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.experts.multi_width import Duo
from jaxmoe.train.train_state import StateSpec
from jaxmoe.train.workdir import Workdir


def write_run(trained, workdir, moe):
  """Writes an untrained model of three layers of one expert a token; returns its workdir."""
  block = BlockConfig(SoftmaxAttention(num_heads=1, num_kv_heads=1, head_dim=8), moe)
  model = TransformerConfig(dim=16, stack=(LayerGroup((block,), 3),))
  experiment = dataclasses.replace(Workdir(trained).experiment(), model=model)
  (workdir / "config.json").write_text(to_json(experiment))
  (workdir / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
  decoder = experiment.decoder()
  spec = StateSpec(decoder, experiment.transform(decoder), one_device(), 0)
  store = open_store(workdir / "checkpoints")
  store.write(3, spec.to_arrays(spec.init(4)), {"data": {"fingerprint": ""}})
  store.close()
  return workdir


@pytest.fixture(scope="module")
def switch(trained, tmp_path_factory):
  """Returns a run of which each layer has two experts alike."""
  return write_run(
    trained, tmp_path_factory.mktemp("switch"), MoEConfig(2, 1, experts=SwiGLU(mlp_dim=8))
  )


def test_budgets_are_those_of_the_widths_of_big_and_small(here, trained, tmp_path):
  workdir = tmp_path / "duo"
  workdir.mkdir()
  write_run(trained, workdir, MoEConfig(3, 1, experts=Duo((8, 2, 0))))
  flags = (f"--workdir={workdir}", f"--out={tmp_path}", "--tokens=2", "--context=9", "--random=5")
  result = here("oracle", *flags, "--budgets=0,0.5,1")
  assert result.code == 0, result
  found = json.loads((tmp_path / "oracle.json").read_text())
  big = 2 * 3 * 16 * 8
  assert found["method"] == "exhaustive" and found["kinds"] == [0, 1, 2]
  assert found["flops_by_layer_and_kind"] == [[big, big // 4, 0]] * 3
  assert found["budgets"] == [0, 1.5 * big, 3 * big]


@pytest.mark.slow
def test_a_study_is_written_labelled_as_no_model_and_repeats(here, switch, tmp_path):
  flags = (f"--workdir={switch}", f"--out={tmp_path}", "--tokens=3", "--context=9", "--random=5")
  result = here("oracle", *flags, "--budgets=0,0.5,1")
  assert result.code == 0, result
  found = json.loads((tmp_path / "oracle.json").read_text())
  text = (tmp_path / "oracle.md").read_text()
  assert found["warning"] in text and text in result.out
  assert found["tokens"] == 3 and found["step"] == 3 and found["kinds"] == [0, 1, -1]
  flops = 2 * 3 * 16 * 8
  assert found["flops_by_layer_and_kind"] == [[flops, flops, 0]] * 3
  assert found["budgets"] == [0, 1.5 * flops, 3 * flops]
  assert found["router"]["flops"] == 3 * flops
  assert np.all(np.diff(found["curves"]["oracle"]) <= 0)
  assert found["curves"]["oracle"][-1] < found["router"]["loss"]
  for method in ("exhaustive", "beam"):  # a beam of 27 is all of them
    again = here("oracle", *flags, "--budgets=0,0.5,1", f"--method={method}", "--width=27")
    assert again.code == 0, again
    more = json.loads((tmp_path / "oracle.json").read_text())
    assert more["curves"] == found["curves"]
  assert {path.name for path in tmp_path.iterdir()} == {"oracle.json", "oracle.md"}


@pytest.mark.parametrize(
  "flags, words",
  [
    (("--kinds=0,a",), "--kinds=0,a: expected numbers"),
    (("--kinds=0,5",), "below 2"),
    (("--past=4",), "one of the kinds"),
    (("--method=best",), "should be one of"),
    (("--method=beam", "--width=0"), "at least one pattern"),
    (("--out=/nowhere",), "no such folder"),
    (("--tokens=99999999", "--context=3"), "take fewer"),
    (("--kinds=1,-1",), "not among kinds"),
    (("--budgets=-1",), "at least 0 FLOPs"),
    (("--budgets=nan",), "at least 0 FLOPs"),
  ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(
  flags, words, here, switch
):
  before = sorted(switch.rglob("*"))
  result = here("oracle", f"--workdir={switch}", "--tokens=2", "--context=9", *flags)
  assert result.code == 2, result
  assert len(result.err.splitlines()) == 1 and words in result.err
  assert sorted(switch.rglob("*")) == before


def test_a_run_that_sends_a_token_to_several_is_refused(here, trained):
  result = here("oracle", f"--workdir={trained}")
  assert (result.code, len(result.err.splitlines())) == (2, 1)
  assert "to several" in result.err
