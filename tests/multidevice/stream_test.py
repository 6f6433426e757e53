"""What a model has beside its blocks, over devices: norms with biases, scales, a biased head."""

import dataclasses
import sys

import pytest

from jaxmoe.models.transformer import Decoder
from jaxmoe.parallel import Parallel
from jaxmoe.parity import Cell, cell_errors, is_green
from jaxmoe.parity.fixture import VOCAB, decoder_of

SETTINGS = {
  "norm": "layer", "head_bias": True, "embed_scale": 2.0, "residual_scale": 0.5, "logit_scale": 0.7,
}  # fmt: skip
COMPARE = sys.modules[cell_errors.__module__]  # the package has a function of this name


@pytest.mark.slow
@pytest.mark.parametrize(
  "parallel", [Parallel(tensor=2, sequence=True), Parallel(fsdp=2, tensor=4)], ids=str
)
def test_settings_of_the_stream_and_the_head_are_right_where_both_are_spread(parallel, monkeypatch):
  def with_settings(cell):
    return Decoder(dataclasses.replace(decoder_of(cell).config, **SETTINGS), VOCAB)

  monkeypatch.setattr(COMPARE, "decoder_of", with_settings)
  COMPARE._reference.cache_clear()
  found = cell_errors(Cell(parallel))
  COMPARE._reference.cache_clear()
  assert is_green(found), found
