"""What every source keeps to, for each member of SOURCES."""

import json

import pytest

from jaxmoe.data.sources import SOURCES
from jaxmoe.data.sources.jsonl import Jsonl
from jaxmoe.data.sources.stdlib import Stdlib
from jaxmoe.data.sources.synthetic import Synthetic
from jaxmoe.data.sources.text import Text

LIMIT = 10**6


@pytest.fixture
def sources(write_texts):
  """Returns {kind: sources that find something}."""
  texts = {f"{i}/a.txt": f"text {i} \N{SNOWMAN}\r\n" for i in range(5)}
  lines = "\n".join(json.dumps({"text": text}) for text in texts.values())
  return {
    "text": [Text(write_texts(texts))],
    "jsonl": [Jsonl(write_texts({"a.jsonl": lines + '\n{"tokens": [1, 2]}'}, "lines"))],
    "stdlib": [Stdlib(domain, max_documents=9) for domain in ("code", "prose", "names")],
    "synthetic": [Synthetic(task, num_documents=9) for task in ("copy", "recall", "add")],
  }


@pytest.mark.parametrize("kind", SOURCES)
def test_a_document_is_read_again_as_it_was_found(sources, kind):
  for source in sources[kind]:
    entries = list(source.scan(LIMIT))
    assert entries
    for entry in entries:
      assert not entry.flaw
      again = source.read(entry.locator)
      assert type(again) is type(entry.content)
      assert list(again) == list(entry.content)


@pytest.mark.parametrize("kind", SOURCES)
def test_names_are_unique_and_scanning_repeats(sources, kind):
  for source in sources[kind]:
    names = [entry.name for entry in source.scan(LIMIT)]
    assert len(set(names)) == len(names)
    assert names == [entry.name for entry in source.scan(LIMIT)]
    assert isinstance(source.domain, str) and source.domain


@pytest.mark.parametrize("kind", SOURCES)
def test_the_tiny_instance_is_of_its_class(kind):
  cls, tiny = SOURCES[kind]
  assert type(tiny) is cls and tiny.domain
