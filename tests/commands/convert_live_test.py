"""What `launch.convert` writes, read by transformers itself."""

import json

import numpy as np
import pytest
import safetensors.numpy

from jaxmoe.models.pretrained import FAMILIES
from tests.models.pretrained import reference
from tests.models.pretrained.checkpoint import write_checkpoint
from tests.models.pretrained.golden import FOLDER

pytest.importorskip("transformers")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_computes_with_an_export_what_it_did_before(here, tmp_path, model_type):
  there, run, back = (tmp_path / name for name in ("there", "run", "back"))
  write_checkpoint(model_type, there)
  assert here("convert", f"--from_hf={there}", f"--workdir={run}").code == 0
  assert here("convert", f"--workdir={run}", f"--to_hf={back}").code == 0
  expected = safetensors.numpy.load_file(FOLDER / model_type / "expected.safetensors")
  model = reference.load(back)
  assert type(model).__name__ == FAMILIES[model_type].architecture
  assert model.config.eos_token_id == 0
  logits, _ = reference.forward(model, expected["ids"])
  np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=1e-5)


def test_transformers_computes_with_a_run_trained_here_what_we_do(trained, here, tmp_path):
  out = tmp_path / "out"
  assert here("convert", f"--workdir={trained}", f"--to_hf={out}").code == 0
  ids = np.random.default_rng(0).integers(0, 257, (2, 20)).astype(np.int32)
  np.save(tmp_path / "ids.npy", ids)
  flags = (f"--ids={tmp_path / 'ids.npy'}", f"--out={tmp_path / 'scores.npz'}", "--logits")
  assert here("score", f"--workdir={trained}", *flags).code == 0
  logits, _ = reference.forward(reference.load(out), ids)
  ours = np.load(tmp_path / "scores.npz")["logits"]
  np.testing.assert_allclose(ours, logits, atol=2e-4, rtol=1e-4)
  assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
