"""Which source a path stands for."""

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.sources import Arrow, Jsonl, Parquet, TextFiles
from jaxmoe.data.sources.auto import source_at


@pytest.mark.parametrize(
  ("names", "source"),
  [
    (["a.txt", "b/c.txt", "notes.md"], TextFiles),
    (["a.jsonl", "b/c.jsonl.gz"], Jsonl),
    (["a.parquet"], Parquet),
    (["a.arrow", "b.feather"], Arrow),
  ],
)
def test_a_folder_is_of_the_kind_of_its_files(write_texts, names, source):
  folder = write_texts(dict.fromkeys(names, "x"))
  assert source_at(folder) == source(folder)
  assert source_at(f"{folder}/{names[0]}") == source(f"{folder}/{names[0]}")


def test_a_file_of_another_suffix_is_text_when_it_is_meant(write_texts):
  folder = write_texts({"a.md": "x", "b.md": "y"})
  for path in (f"{folder}/a.md", f"{folder}/*.md"):
    assert source_at(path) == TextFiles(path)
  with pytest.raises(InputError, match=r"no \.txt or \.jsonl or .* file at"):
    source_at(folder)


def test_two_kinds_in_a_folder_are_refused_in_one_line(write_texts):
  folder = write_texts({"a.txt": "x", "b/c.jsonl": "{}"})
  with pytest.raises(InputError, match=r"several kinds, such as a\.txt and b/c\.jsonl; give each"):
    source_at(folder)
