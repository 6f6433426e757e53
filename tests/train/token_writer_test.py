"""Prompts in chunks, several tokens a dispatch, caches in place, the head on a row's last token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.tokens import Tokens
from jaxmoe.hlo.traffic import movements
from jaxmoe.models import token_writer
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.generate import Sampling, generate
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.token_writer import TokenWriter, lower_draw
from jaxmoe.models.transformer import Decoder, TransformerConfig

CONTEXT, EOD, VOCAB = 40, 18, 19
PROMPTS = [np.array(ids, np.int32) for ids in ([EOD, 3, 1], [EOD], [EOD, *range(17), 2, 9, 4, 4])]


@pytest.fixture(scope="module")
def model(decoder_of, params_of):
  decoder = decoder_of()
  params = params_of(decoder, 3)
  params["head"]["weight"] = params["head"]["weight"] * 8
  return decoder, params


@pytest.fixture(scope="module")
def written(model):
  return {t: generate(*model, PROMPTS, Sampling(12, t), (CONTEXT, EOD)) for t in (0.0, 1.5)}


@pytest.mark.parametrize("chunk", [5, 22])
def test_a_prompt_in_chunks_is_the_prompt(model, written, monkeypatch, chunk):
  monkeypatch.setattr(token_writer, "_CHUNK", chunk)
  reads = []
  read = token_writer._read
  monkeypatch.setattr(token_writer, "_read", lambda *given: reads.append(1) or read(*given))
  # A prompt of 22 tokens: the others end in an earlier chunk than the last one.
  assert generate(*model, PROMPTS, Sampling(12, 0.0), (CONTEXT, EOD)) == written[0.0]
  assert len(reads) == {5: 4, 22: 0}[chunk]


@pytest.mark.parametrize("patience, sizes", [(1e9, [1, 2, 4, 4]), (-1.0, [1] * 11)])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_tokens_do_not_depend_on_how_many_a_dispatch_writes_and_each_is_told_as_it_comes(
  model, written, monkeypatch, patience, sizes, temperature
):
  monkeypatch.setattr(token_writer, "_PATIENCE_S", patience)
  found, told = [], []
  write = TokenWriter.write

  def count(writer, most):
    ids_NB, finite_N = write(writer, most)
    found.append(len(ids_NB))
    told.append(sum(map(len, seen)))
    return ids_NB, finite_N

  monkeypatch.setattr(TokenWriter, "write", count)
  seen = [[] for _ in PROMPTS]
  emit = lambda row, token: seen[row].append(token)  # noqa: E731
  rows = generate(*model, PROMPTS, Sampling(12, temperature), (CONTEXT, VOCAB), emit)
  assert rows == seen and found == sizes
  assert told == sorted(set(told)), "before each dispatch all tokens so far were told"
  if temperature == 0:
    cut = [row[: row.index(EOD)] if EOD in row else row for row in rows]
    assert cut == written[0.0]


def test_a_dispatch_ends_where_all_rows_have(model, written, monkeypatch):
  monkeypatch.setattr(token_writer, "_PATIENCE_S", 1e9)
  row = written[0.0][0]
  end = next(token for token in row[5:] if token not in row[:5])
  writer = TokenWriter(
    *model, (CONTEXT, CONTEXT), frozenset([end]), token_writer.Chance.of(0.0, 1.0, 0), True
  )
  writer.read(PROMPTS[:1])
  sizes = [len(writer.write(32)[0]) for _ in range(5)]
  assert sum(sizes) == row.index(end) and sizes[-1] == 0


def test_layers_apart_have_their_own_leaves_and_give_what_stacked_ones_do(model):
  decoder, params = model
  apart = jax.jit(decoder.apart)(params)
  layers = decoder.config.num_layers
  assert sum(len(places) for places in apart["stack"]) == layers > 1
  for leaf in jax.tree.leaves(apart["stack"]):
    assert leaf.shape[0] == 1
  sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
  assert sizes(apart) == sizes(params)
  tokens = Tokens.of_ids(jnp.asarray(PROMPTS[2][None]))
  run = jax.jit(decoder.hidden)
  caches = decoder.empty_caches(1, 24), decoder.caches_apart(1, 24)
  stacked, others = run(params, tokens, caches[0]), run(apart, tokens, caches[1])
  np.testing.assert_allclose(others[0], stacked[0], rtol=1e-5, atol=1e-6)
  close = lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)  # noqa: E731
  jax.tree.map(close, others[1], decoder._stack.apart(stacked[1]))
  jax.tree.map(close, others[2], stacked[2])
  assert set(param_names.flatten(params)) == set(param_names.flatten(decoder.shapes))


@pytest.mark.parametrize("rows", [1, 2])
def test_caches_are_written_in_place(rows):
  block = BlockConfig(SoftmaxAttention(2, 2, 16), MLPConfig(8))
  decoder = Decoder(TransformerConfig(dim=8, stack=(LayerGroup((block,), 2),)), VOCAB)
  caches = jax.eval_shape(lambda: decoder.caches_apart(rows, 2048))
  sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches)]
  for new in (1, 32):
    memory = lower_draw(decoder, rows, new, 2048).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(sizes)
  compiled = lower_draw(decoder, rows, 1, 2048).compile()
  # A copy reads as much as it writes; products read keys or values once.
  moved = {one.scope: one.bytes for one in movements(compiled) if one.bytes >= 2 * max(sizes)}
  assert moved == {}
  assert compiled.memory_analysis().temp_size_in_bytes < sum(sizes) / 4


def test_the_head_sees_the_last_token_of_each_row_alone(model):
  text = lower_draw(model[0], 3, 32, 64).as_text()
  assert f"3x{VOCAB}xf32" in text
  assert f"96x{VOCAB}x" not in text and f"32x{VOCAB}x" not in text
