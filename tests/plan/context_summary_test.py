import dataclasses
import math

import numpy as np
import pytest

from configs.tiny import get_config
from jaxmoe.core.errors import InputError
from jaxmoe.cost.links import LinkProfile, LinkRate
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.parallel import Parallel
from jaxmoe.plan.advice_text import context_text
from jaxmoe.plan.context_summary import (
  attention_work,
  context_summary,
  read_lengths,
  rows_of_lengths,
)

LINKS = LinkProfile("ring", LinkRate(1e-6, 1e10), LinkRate(1e-6, 1e10))


def recipe(context, seq_len=64):
  found = get_config()
  return dataclasses.replace(
    found,
    parallel=Parallel(context=context),
    data=dataclasses.replace(found.data, seq_len=seq_len),
  )


def test_each_strategy_is_told_and_one_chosen():
  found = context_summary(recipe(4), LINKS, None, 1e12)
  (each,) = found
  assert each.layers == recipe(4).model.num_layers and each.rows == 1
  assert {time.attend for time in each.times} == {"gather", "ring", "token_ring", "ulysses"}
  assert f"attend={each.times[0].attend} " in each.choice
  lines = list(context_text(found))
  assert all(len(line) <= 80 for line in lines)


def test_lengths_change_what_is_uneven():
  whole = context_summary(recipe(4), LINKS, None, 1e12)[0]
  many = context_summary(recipe(4), LINKS, np.full(64, 6), 1e12)[0]
  uneven = lambda found: {  # noqa: E731
    time.order: time.imbalance for time in found.times if time.attend == "ring"
  }
  assert uneven(whole)["zigzag"] == 1.0
  assert uneven(many)["balanced"] <= uneven(many)["zigzag"] != 1.0


def test_what_the_model_refuses_is_told_with_its_line():
  found = context_summary(recipe(8), LINKS, None, 1e12)[0]
  refused = {time.attend for time in found.times if math.isinf(time.seconds)}
  assert refused == {"ulysses"}
  text = " ".join("\n".join(context_text([found])).split())
  assert "ulysses is not to be had: " in text


def test_rows_are_packed_one_document_after_the_other():
  rows = rows_of_lengths([3, 6, 2], 4)
  assert [row.tolist() for row in rows] == [[1, 1, 1, 2], [2, 2, 2, 2]]
  assert [row.tolist() for row in rows_of_lengths([1], 4)] == [[1, 0, 0, 0]]
  assert len(rows_of_lengths(np.full(1000, 64), 64)) == 16


def test_latents_are_sent_as_latents():
  heads = SoftmaxAttention(num_heads=8, num_kv_heads=2, head_dim=16)
  work = attention_work(heads, 4, 1e12)
  assert (work.query_bytes, work.key_bytes, work.found_bytes) == (512.0, 256.0, 544.0)
  assert work.flops_per_pair == 4 * 8 * 16
  latent = LatentAttention(num_heads=8, head_dim=16, rope_dim=4, value_dim=16, latent_dim=32)
  assert attention_work(latent, 2, 1e12).key_bytes == (32 + 4) * 2


def test_a_recipe_without_context_devices_and_bad_lengths_are_one_line(tmp_path):
  with pytest.raises(InputError, match="set parallel"):
    context_summary(recipe(1), LINKS, None, 1e12)
  path = tmp_path / "lengths.npy"
  np.save(path, np.array([3, 5]))
  assert read_lengths(str(path)).tolist() == [3, 5]
  for bad in (np.array([0, 3]), np.array([1.5]), np.array([[2]]), np.array([], int)):
    np.save(path, bad)
    with pytest.raises(InputError, match="whole numbers above 0"):
      read_lengths(str(path))
  path.write_text("3, 5")
  with pytest.raises(InputError, match="is no plain"):
    read_lengths(str(path))
