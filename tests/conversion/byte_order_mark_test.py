"""JSON that users bring is read with a byte order mark, as editors on Windows write one."""

import codecs
import json

import pytest

from jaxmoe.conversion.hf_files import read_object
from jaxmoe.core.config_io import to_json
from jaxmoe.data.tokenizers.template_file import find_template
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.models.pretrained.config_reader import read_config
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.expert_counts import read_expert_counts

TOKENIZER = {
  "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
  "pre_tokenizer": None, "post_processor": None, "decoder": None,
  "model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "a": 1}, "unk_token": "a"},
}  # fmt: skip


def tokenizer(path):
  return TokenizerFile(str(path), 2).build((), "", None, print).digest


def recipe(path):
  return to_json(load_recipe(str(path), []))


READERS = {
  "config.json": (lambda path: read_config(path.parent)[0], {"model_type": "olmoe"}),
  "generation_config.json": (read_object, {"eos_token_id": 1}),
  "tokenizer_config.json": (lambda path: find_template(path.parent), {"chat_template": "x"}),
  "usage.json": (lambda path: [row.tolist() for row in read_expert_counts(str(path))], [[1, 2]]),
  "tokenizer.json": (tokenizer, TOKENIZER),
  "recipe.json": (recipe, None),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_says_the_same_with_a_byte_order_mark(tmp_path, name):
  read, content = READERS[name]
  text = to_json(load_recipe("configs/tiny.py", [])) if content is None else json.dumps(content)
  path = tmp_path / name
  path.write_text(text, encoding="utf-8")
  plain = read(path)
  path.write_bytes(codecs.BOM_UTF8 + text.encode("utf-8"))
  assert read(path) == plain
