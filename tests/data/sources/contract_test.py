"""What every source keeps to, for each member of SOURCES."""

import json

import pytest

from jaxmoe.data.sources import SOURCES
from jaxmoe.data.sources.arrow import Arrow
from jaxmoe.data.sources.jsonl import Jsonl
from jaxmoe.data.sources.parquet import Parquet
from jaxmoe.data.sources.stdlib import Stdlib
from jaxmoe.data.sources.synthetic import Synthetic
from jaxmoe.data.sources.text_files import TextFiles

LIMIT = 10**6
OTHERS = '{"tokens": [1, 2]}\n{"messages": [{"role": "assistant", "content": "yes"}]}'


COLUMNS = {
  "text": [f"text {i} \N{SNOWMAN}\r\n" for i in range(9)],
  "tokens": [[i, 7, 2**31 - 1] for i in range(9)],
  "messages": [
    [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": ""}] for i in range(9)
  ],
}


def _rows(write_rows, source, names):
  for field, column in COLUMNS.items():
    for name in names:
      yield source(write_rows(name, column, field, folder=f"{field}-{name}"), field)


@pytest.fixture
def sources(request, write_texts):
  """Returns {kind: sources that find something}."""
  if request.node.callspec.params["kind"] in ("parquet", "arrow"):
    write_rows = request.getfixturevalue("write_rows")
    return {
      "parquet": list(_rows(write_rows, Parquet, ["a.parquet"])),
      "arrow": list(_rows(write_rows, Arrow, ["a.arrow", "a.feather", "a.stream.arrow"])),
    }
  texts = {f"{i}/a.txt": f"text {i} \N{SNOWMAN}\r\n" for i in range(5)}
  lines = "\n".join(json.dumps({"text": text}) for text in texts.values())
  return {
    "text": [TextFiles(write_texts(texts))],
    "jsonl": [Jsonl(write_texts({"a.jsonl": f"{lines}\n{OTHERS}"}, "lines"))],
    "stdlib": [Stdlib(domain, max_documents=9) for domain in ("code", "prose", "names")],
    "synthetic": [Synthetic(task, num_documents=9) for task in ("copy", "recall", "add")],
  }


@pytest.mark.parametrize("kind", SOURCES)
def test_a_document_is_read_again_as_it_was_found(sources, kind):
  for source in sources[kind]:
    entries = list(source.scan(LIMIT))
    assert entries
    for entry in entries:
      assert not entry.error
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
