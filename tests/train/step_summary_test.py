import dataclasses
import json
import math

import numpy as np
import pytest

from jaxmoe.core.metrics import Mean
from jaxmoe.moe.layer import MoESums
from jaxmoe.moe.routing import RouterSums
from jaxmoe.train.step_summary import layer_summary, number, summarize

E = 6


def sums_of(counts, dropped=None, tokens=None, log_z_squared=0.0, adaptive_coefficient=None):
  counts = np.asarray(counts, np.float32)
  tokens = np.asarray(counts.sum(-1) / 2 if tokens is None else tokens, np.float32)
  scores = np.ones_like(counts)
  log_z_squared = np.asarray(log_z_squared, np.float32)
  zeros = np.zeros_like(tokens)
  router = RouterSums(counts, scores, tokens, log_z_squared, zeros, counts, adaptive_coefficient)
  return MoESums(router, dropped or {}, idle=zeros)


COUNTS = ([9, 0, 3, 1, 0, 7], [5] * E, [0, 0, 40, 0, 0, 0], [1e6, 1, 1, 0, 0, 2])


@pytest.mark.parametrize("counts", COUNTS)
def test_the_numbers_of_a_layer_are_those_of_their_definitions(counts):
  found = layer_summary(sums_of(counts, {"full": np.float32(3)}, log_z_squared=12.5))
  total = sum(counts)
  load = [count / total for count in counts]
  entropy = -sum(share * math.log(share) for share in load if share) / math.log(E)
  np.testing.assert_allclose(found["load"], load, rtol=1e-6)
  np.testing.assert_allclose(found["load_entropy"], entropy, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(found["max_violation"], max(load) / (1 / E) - 1, rtol=1e-5, atol=1e-7)
  assert found["dead"] == counts.count(0)
  np.testing.assert_allclose(found["drop_rate"], 3 / total, rtol=1e-6)
  assert found["dropped"] == {"full": 3.0}
  np.testing.assert_allclose(found["effective_k"], (total - 3) / (total / 2), rtol=1e-6)
  np.testing.assert_allclose(found["router_z"], 12.5 / (total / 2), rtol=1e-6)


def test_choices_of_experts_that_compute_nothing_are_no_effective_ones():
  sums = dataclasses.replace(sums_of([4] * E, {"full": np.float32(3)}), idle=np.float32(8))
  np.testing.assert_allclose(layer_summary(sums)["effective_k"], (24 - 3 - 8) / 12, rtol=1e-6)


def test_only_a_router_that_keeps_a_factor_has_its_pressure_told():
  assert "pressure" not in layer_summary(sums_of([4] * E))
  found = layer_summary(sums_of([4] * E, adaptive_coefficient=np.float32(12 * 0.75)))
  assert found["pressure"] == 0.75


def test_a_layer_that_saw_no_token_has_no_choices_and_no_means():
  found = layer_summary(sums_of([0] * E, tokens=0, adaptive_coefficient=np.float32(0)))
  assert found.pop("load") == [0.0] * E
  assert found.pop("dead") == E
  assert found.pop("dropped") == {}
  assert found == dict.fromkeys(
    ("load_entropy", "max_violation", "drop_rate", "effective_k", "router_z", "pressure")
  )


def test_a_layer_that_sent_its_tokens_nowhere_has_no_mean_over_choices():
  found = layer_summary(sums_of([0] * E, tokens=4, log_z_squared=2.0))
  assert (found["effective_k"], found["router_z"], found["dead"]) == (0.0, 0.5, E)
  assert found["load_entropy"] is found["max_violation"] is found["drop_rate"] is None


def test_drops_of_all_reasons_add_up():
  found = layer_summary(sums_of([4] * E, {"full": np.float32(3), "late": np.float32(5)}))
  np.testing.assert_allclose(found["drop_rate"], 8 / 24, rtol=1e-6)


def metrics(**fields):
  """The metrics of a step with layers 0 and 2 dense: layer_groups ((1, 1), (2, 2), (1, 1))."""

  def layers(*hot):
    counts = np.stack([np.roll([12, 0, 0, 0, 0, 0], expert) for expert in hot])
    return sums_of(counts, log_z_squared=np.zeros(len(hot)))

  stacked, last = layers(2, 4), layers(5)
  return {
    "layers": {"0": {"0": None}, "1": {"0": None, "1": stacked}, "2": {"0": last}},
    "loss": Mean(np.float32(10), np.float32(4)),
    "total_loss": np.float32(2.75),
    "balance": {"load_balance_global": np.float32(1.25), "router_z": np.float32(0.5)},
    "tokens": np.float32(7),
    "grad_norm": np.float32(0.1),
    "learning_rate": np.float32(1e-3),
    "skipped": np.int32(2),
    "finite": np.bool_(True),
    "in_a_row": np.int32(0),
    "unlabelled": np.int32(0),
    **fields,
  }


SPLITS = ((1, 1), (2, 2), (1, 1))


def test_layers_are_numbered_by_depth_whatever_they_are_stacked_in():
  plain = summarize(metrics(), SPLITS)
  hot = {name: int(np.argmax(layer["load"])) for name, layer in plain["layers"].items()}
  assert hot == {"2": 2, "4": 4, "5": 5}


def test_a_summary_is_json_of_what_the_step_returned():
  given = metrics()
  plain = summarize(given, SPLITS)
  assert json.loads(json.dumps(plain, allow_nan=False)) == plain
  del plain["layers"]
  assert plain == {
    "loss": 2.5, "total_loss": 2.75, "load_balance_global": 1.25, "router_z": 0.5, "tokens": 7.0,
    "grad_norm": 0.1, "learning_rate": 0.001, "skipped": 2,
  }  # fmt: skip
  assert given["layers"], "what was given is as it was"


def test_a_step_without_labels_has_neither_loss_nor_norm_and_is_counted():
  nothing = Mean(np.float32(0), np.float32(0))
  plain = summarize(metrics(loss=nothing, unlabelled=np.int32(3)), SPLITS)
  assert plain["loss"] is plain["total_loss"] is plain["grad_norm"] is None
  assert (plain["labels"], plain["unlabelled"], plain["skipped"]) == (0, 3, 2)
  assert (plain["learning_rate"], plain["router_z"], plain["tokens"]) == (0.001, 0.5, 7.0)
  then = summarize(metrics(unlabelled=np.int32(3)), SPLITS)
  assert then == {**summarize(metrics(), SPLITS), "unlabelled": 3}


def test_a_step_without_tokens_has_no_balance():
  nothing = Mean(np.float32(0), np.float32(0))
  plain = summarize(metrics(loss=nothing, tokens=np.float32(0)), SPLITS)
  assert plain["load_balance_global"] is plain["router_z"] is None
  json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_become_none(value):
  bad = np.float32(value)
  plain = summarize(metrics(loss=Mean(bad, np.float32(4)), grad_norm=bad), SPLITS)
  assert plain["loss"] is plain["grad_norm"] is None
  json.dumps(plain, allow_nan=False)


def test_a_number_has_the_shortest_digits_that_read_back_as_the_same_float32():
  for seed in range(50):
    value = np.float32(np.random.default_rng(seed).normal() * 10.0 ** (seed % 30 - 15))
    assert np.float32(number(value)) == value
    assert number(value) == float(f"{number(value):.8e}"), "more than nine digits"
  assert repr(number(np.float32(0.1))) == "0.1"
  assert number(np.int32(7)) == 7
  assert isinstance(number(np.int32(7)), int)
