"""Which files a path stands for."""

import os

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.sources.text import Text, find_files

FILES = {"a.txt": "a", "b/c.txt": "c", "b/d.md": "d", "b/e[1].txt": "e"}


def _names(path):
  return [name for name, _ in find_files(path, (".txt",))]


def test_a_folder_stands_for_the_text_files_below_it(write_texts):
  assert _names(write_texts(FILES)) == ["a.txt", "b/c.txt", "b/e[1].txt"]


def test_a_glob_counts_from_its_folder_without_wildcards(write_texts):
  folder = write_texts(FILES)
  assert _names(os.path.join(folder, "**", "*.txt")) == ["a.txt", "b/c.txt", "b/e[1].txt"]
  assert _names(os.path.join(folder, "b", "*.md")) == ["d.md"]


def test_a_file_stands_for_itself_even_with_brackets_in_its_name(write_texts):
  folder = write_texts(FILES)
  assert _names(os.path.join(folder, "b", "e[1].txt")) == ["e[1].txt"]
  assert _names(write_texts(FILES, "odd[1]")) == ["a.txt", "b/c.txt", "b/e[1].txt"]


def test_a_folder_without_text_files_is_refused(write_texts):
  with pytest.raises(InputError, match=r"no \.txt file"):
    list(Text(write_texts({"a.md": "a"})).scan(9))
