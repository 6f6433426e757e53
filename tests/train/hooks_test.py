import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.config_io import from_json
from jaxmoe.data.tokenizers.byte import ByteTokenizer
from jaxmoe.models import generate as generation
from jaxmoe.train import hooks
from jaxmoe.train.append_file import AppendFile
from jaxmoe.train.evaluate import evaluate, first_documents
from jaxmoe.train.experiment import Evaluation, Samples
from jaxmoe.train.hooks import EvaluationHook, SamplesHook, cut_samples, encode_prompt

TOKENIZER = ByteTokenizer()
ENDS = (256, 256)


@pytest.fixture(scope="module")
def model(decoder_of, params_of):
  decoder = decoder_of(vocab_size=TOKENIZER.vocab_size)
  return decoder, params_of(decoder)


def documents(*texts):
  sizes = [len(text.encode()) for text in texts]
  return [
    types.SimpleNamespace(
      ids=TOKENIZER.encode(text), scored=None, num_bytes=size, scored_bytes=size
    )
    for text, size in zip(texts, sizes)
  ]


@pytest.fixture
def samples(model, tmp_path):
  """Returns a function from the fields of Samples to a hook that writes samples.md."""

  def make(**fields):
    config = Samples(**{"prompts": ("ab", "c"), "max_tokens": 6, **fields})
    return SamplesHook(config, model[0], TOKENIZER, 32, AppendFile(tmp_path / "samples.md"))

  return make


def state_of(params):
  return types.SimpleNamespace(params=params)


@pytest.mark.parametrize("rows", ["fitted", "full"])
def test_evaluation_scores_the_first_documents_of_every_domain(model, observers, display, rows):
  decoder, params = model
  domains = {"a": documents(*["abc"] * 9), "b": documents("x" * 30, "y")}
  config = Evaluation(7, max_bytes=10, batch_size=2, rows=rows)
  hook = EvaluationHook(config, decoder, domains, (ENDS, 8), observers)
  assert (hook.every, hook.name) == (7, "evaluation")
  chosen = {name: first_documents(of, 10) for name, of in domains.items()}
  scores = evaluate(decoder, params, chosen, ENDS, (2, 8), fitted=rows == "fitted")
  line = hook(14, state_of(params))["eval"]
  a, b = scores["domains"].values()
  assert line == {**scores, "bits_per_byte": (27 * a + 31 * b) / 58}
  said = "bits/byte at step 14 of a slice of held-out text (10 of 58 bytes): a "
  assert display.said[-1].startswith(said)
  before = dataclasses.replace(config, overall="scored")
  hook = EvaluationHook(before, decoder, domains, (ENDS, 8), observers)
  assert hook(14, state_of(params)) == {"eval": scores}


def test_a_recipe_of_before_scores_full_rows_and_a_new_one_those_it_needs():
  assert from_json(Evaluation, '{"every": 7}') == Evaluation(7, rows="full", overall="scored")
  assert Evaluation().rows == "fitted"


def test_a_score_that_is_not_finite_can_still_be_written(model, observers):
  decoder, params = model
  broken = {**params, "embed": {"table": params["embed"]["table"] * np.nan}}
  hook = EvaluationHook(Evaluation(1), decoder, {"a": documents("abc")}, (ENDS, 8), observers)
  line = hook(1, state_of(broken))
  assert line["eval"].pop("routing").keys() == {"0", "1"}
  assert line == {"eval": {"bits_per_byte": None, "domains": {"a": None}}}
  json.dumps(line, allow_nan=False)


def test_a_domain_in_which_nothing_is_scored_is_told_and_null(model, observers, display):
  (silent,) = documents("abc")
  silent.scored, silent.scored_bytes = np.zeros(4, bool), 0
  hook = EvaluationHook(Evaluation(1), model[0], {"chat": [silent]}, (ENDS, 8), observers)
  line = hook(1, state_of(model[1]))
  assert line == {"eval": {"bits_per_byte": None, "domains": {"chat": None}, "routing": {}}}
  assert "chat has nothing to score" in display.said[-1]


def test_samples_are_the_texts_that_generation_gives(model, samples, tmp_path):
  decoder, params = model
  hook = samples(temperature=0.7, top_p=0.9)
  assert hook(5, state_of(params)) == {}
  prompts = [encode_prompt(TOKENIZER, text) for text in ("ab", "c")]
  rows = generation.generate(
    decoder, params, prompts, generation.Sampling(6, 0.7, 0.9), (32, TOKENIZER.eod_id)
  )
  texts = [text + TOKENIZER.decode(row) for text, row in zip(("ab", "c"), rows)]
  assert not any("`" in text for text in texts)
  blocks = [f"```text\n{text}\n```\n" for text in texts]
  written = (tmp_path / "samples.md").read_bytes().decode()
  assert written == "\n".join(["## step 5\n", *blocks]) + "\n"


def test_a_section_that_waited_is_that_of_the_parameters_it_waited_with(model, samples, tmp_path):
  params = model[1]
  samples()(0, state_of(params))
  at_once = (tmp_path / "samples.md").read_bytes()
  hook = samples()
  given = jax.tree.map(jnp.copy, params)
  hook.wait(0, state_of(given))
  donated = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(given)
  assert hook.waits and all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
  hook(5, state_of(donated))
  assert not hook.waits
  written = (tmp_path / "samples.md").read_bytes().removeprefix(at_once)
  assert written.startswith(at_once + b"## step 5\n")
  hook.catch_up()
  assert (tmp_path / "samples.md").read_bytes() == at_once + written


def test_a_recipe_without_samples_lets_none_wait(model, tmp_path):
  file = AppendFile(tmp_path / "samples.md")
  hook = SamplesHook(Samples(every=0), model[0], TOKENIZER, 32, file)
  hook.wait(0, state_of(model[1]))
  assert not hook.waits


def test_the_same_step_writes_the_same_samples_again(model, samples, tmp_path):
  for _ in range(2):
    samples()(5, state_of(model[1]))
  halves = (tmp_path / "samples.md").read_bytes()
  assert halves[: len(halves) // 2] == halves[len(halves) // 2 :]


def test_a_model_that_is_broken_writes_no_sample_and_ends_no_run(model, samples, tmp_path):
  params = model[1]
  broken = {**params, "embed": {"table": params["embed"]["table"] * np.nan}}
  assert samples()(5, state_of(broken)) == {}
  written = (tmp_path / "samples.md").read_text()
  assert written.startswith("## step 5\n\nNo samples: ") and "not finite" in written
  assert "```" not in written


def test_without_prompts_no_sample_is_ever_due(samples):
  assert samples(prompts=(), every=3).every == 0
  assert samples(every=3).every == 3


TEXTS = (
  "plain",
  "## step 99",
  "one\n## step 2\ntwo",
  "carriage\r## step 99\rreturn\r\n",
  "```text\n## step 99\n```\n",
  "````text\n`````\n## step 99",
  "\u2028## step 99\x0c\n\x85",
  "",
)


def write(hook, step, text, monkeypatch):
  ids = list(text.encode())
  monkeypatch.setattr(hooks, "generate", lambda *arguments: [ids, ids])
  hook(step, state_of(None))


@pytest.mark.parametrize("step", range(5))
def test_going_on_keeps_the_sections_up_to_the_step_whatever_the_model_wrote(
  samples, tmp_path, monkeypatch, step
):
  path, hook, after = tmp_path / "samples.md", samples(), {0: b""}
  for first in range(len(TEXTS)):
    path.unlink(missing_ok=True)
    for n in range(1, 5):
      write(hook, n, TEXTS[(first + n) % len(TEXTS)], monkeypatch)
      after[n] = path.read_bytes()
    cut_samples(path, step)
    assert path.read_bytes() == after[step]
    for n in range(step + 1, 5):
      write(hook, n, TEXTS[(first + n) % len(TEXTS)], monkeypatch)
    assert path.read_bytes() == after[4]


@pytest.mark.parametrize("cut", [1, 5, 12, 20])
def test_a_torn_section_is_cut_too(samples, tmp_path, monkeypatch, cut):
  path, hook = tmp_path / "samples.md", samples()
  write(hook, 10, "whole", monkeypatch)
  whole = path.read_bytes()
  write(hook, 20, "torn", monkeypatch)
  path.write_bytes(path.read_bytes()[: len(whole) + cut])
  cut_samples(path, 10)
  assert path.read_bytes() == whole


def test_going_on_without_samples_makes_no_file(tmp_path):
  cut_samples(tmp_path / "samples.md", 3)
  assert list(tmp_path.iterdir()) == []


def test_a_prompt_starts_with_the_end_of_a_document():
  ids = encode_prompt(TOKENIZER, "aé")
  np.testing.assert_array_equal(ids, [256, 97, 0xC3, 0xA9])
  assert ids.dtype == np.int32
