"""Counts of choices: every choice of every token once, and what a file may hold."""

import json
import types

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.train.expert_counts import LINES, count_experts, held_out_batches, read_expert_counts

EOD, L = 7, 6


def document(length, seed):
  ids = np.random.default_rng(seed).integers(0, EOD, length).astype(np.int32)
  return types.SimpleNamespace(ids=ids, scored=None)


class Documents:
  """A corpus of two domains, one longer than the other."""

  domains = ("a", "b")
  tokenizer = types.SimpleNamespace(start_id=EOD, eod_id=EOD)

  def held_out(self, name):
    return {"a": [document(n, n) for n in (5, 2, 4)], "b": [document(3, 9)]}[name]


def test_every_choice_of_every_token_of_held_out_documents_is_counted_once():
  attention = SoftmaxAttention(num_heads=1, num_kv_heads=1, head_dim=4)
  sparse = BlockConfig(attention, MoEConfig(5, 2, experts=SwiGLU(mlp_dim=4)))
  stack = (
    LayerGroup((sparse, BlockConfig(attention, MLPConfig(mlp_dim=4))), 1),
    LayerGroup((sparse,), 1),
  )
  decoder = Decoder(TransformerConfig(dim=4, stack=stack), EOD + 1)
  params = decoder.init(Keys.from_seed(0))
  batches = list(held_out_batches(Documents(), (2, L)))
  usage = count_experts(decoder, params, batches)
  tokens = sum(size + 1 for size in (5, 2, 4, 3))  # the end of document is fed in front
  assert [of.sum() for of in usage] == [2 * tokens, 2 * tokens]
  assert [of.max() <= tokens for of in usage] == [True, True]
  halves = [count_experts(decoder, params, [batch]) for batch in batches]
  assert len(halves) > 1
  np.testing.assert_array_equal(sum(np.stack(of) for of in halves), np.stack(usage))


def test_held_out_documents_come_from_each_domain_in_turn():
  batch = next(iter(held_out_batches(Documents(), (2, 64))))
  own = batch["ids"][0][batch["segment"][0] == 2]
  np.testing.assert_array_equal(own[1:], document(3, 9).ids)


def test_a_file_of_counts_is_read_in_each_of_its_forms(tmp_path):
  rows = [[1, 2, 3], [4, 0, 6]]
  np.save(tmp_path / "usage.npy", np.array(rows))
  (tmp_path / "usage.json").write_text(json.dumps(rows))
  for name in ("usage.npy", "usage.json"):
    np.testing.assert_array_equal(read_expert_counts(str(tmp_path / name)), rows)
  # Layer 10 comes after layer 2, and lines before the last 100 do not count.
  old = {"step": 0, "layers": {"10": {"load": [9, 9]}, "2": {"load": [9, 9]}}}
  new = {"step": 1, "layers": {"10": {"load": [1, 0]}, "2": {"load": [0.5, 0.25]}}}
  lines = [old] + [new] * LINES
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  np.testing.assert_allclose(
    read_expert_counts(str(tmp_path / "metrics.jsonl")), [[0.5, 0.25], [1, 0]]
  )


@pytest.mark.parametrize(
  "name, content, why",
  [
    ("usage.json", "{", "holds no counts"),
    ("usage.json", "[1, 2]", "holds no counts"),
    ("usage.json", '[["a"]]', "holds no counts"),
    ("usage.npy", "no array", "holds no counts"),
    ("usage.txt", "1", "of no kind known"),
    ("metrics.jsonl", "", "no whole line"),
    ("metrics.jsonl", '{"step": 1}\n', "holds no counts"),
    ("nowhere.jsonl", None, "cannot be read"),
  ],
)
def test_a_file_without_counts_is_refused_in_one_line(name, content, why, tmp_path):
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(InputError, match=why) as refused:
    read_expert_counts(str(tmp_path / name))
  assert "\n" not in str(refused.value)
