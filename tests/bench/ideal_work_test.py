"""The least work of models, by hand, and that programs do no less."""

import pytest

from jaxmoe.bench.ideal_work import decode_work, product, step_work
from jaxmoe.bench.model_shapes import SHAPES, experiment_of


def test_a_product_reads_two_factors_and_writes_one_result():
  work = product(3, 5, 7)
  assert work.flops == 2 * 3 * 5 * 7 and work.bytes == 4 * (15 + 35 + 21)
  assert product(3, 5, 7, weights=2).bytes == 4 * (15 + 70 + 21)


def test_a_token_of_small8_needs_29_million_operations_and_its_weights_once():
  experiment = experiment_of("small8")
  slots = 97
  work = decode_work(experiment, 1, 1, slots)
  attention, router, experts, head = 4 * 512**2, 512 * 8, 2 * 3 * 512**2, 512 * 8192
  weights = 4 * (attention + router + experts) + head
  assert work.flops == 2 * weights + 4 * 4 * 512 * slots
  cache = 4 * 2 * 512 * slots
  few = 60_000  # what the products read and write beside weights and cache, logits most of all
  assert 4 * (weights + cache) < work.bytes < 4 * (weights + cache + few)
  assert round(2 * weights / 1e6) == 29
  assert experiment.decoder().num_params == 37_770_240


def test_sixteen_rows_of_a_token_read_every_expert_once():
  experiment = experiment_of("small8")
  one, many = decode_work(experiment, 1, 1, 97), decode_work(experiment, 16, 1, 97)
  assert many.flops == pytest.approx(16 * one.flops)
  experts = 4 * 4 * 3 * 512**2
  assert many.bytes - 16 * one.bytes < 0 and many.bytes > one.bytes + 6 * experts


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_has_the_operations_that_mfu_counts(shape):
  experiment = experiment_of(shape)
  tokens = experiment.train.batch_size * experiment.data.seq_len
  model, vocab_size = experiment.model, experiment.data.tokenizer.vocab_size
  counted = tokens * model.train_flops_per_token(vocab_size, experiment.data.seq_len)
  assert step_work(experiment).flops == pytest.approx(counted, rel=1e-3)
