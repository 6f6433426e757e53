"""Domains of the standard library."""

import unicodedata

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.sources.stdlib import Stdlib


def test_code_leaves_out_tests_topics_packages_and_empty_modules(write_texts):
  kept = {"a.py": "1", "json/tool.py": "2", "testing.py": "3"}
  left = {
    "test/b.py": "4", "json/tests/c.py": "5", "idlelib/idle_test/d.py": "6", "e.pyc": "7",
    "site-packages/f.py": "8", "pydoc_data/topics.py": "9", "g/__init__.py": "", "h.py": " \n",
  }  # fmt: skip
  root = write_texts({**kept, **left})
  entries = list(Stdlib(root=root).scan(99))
  assert {entry.name: entry.content for entry in entries} == kept
  assert [entry.name for entry in Stdlib(root=root, max_documents=2).scan(99)] == [
    "a.py", "json/tool.py",
  ]  # fmt: skip


def test_a_library_without_sources_names_the_other_way(write_texts):
  root = write_texts({"a.pyc": "x"})
  with pytest.raises(InputError, match=r"no \.py sources.*folder of \.txt files.*text=FOLDER"):
    list(Stdlib(root=root).scan(99))


def test_names_are_the_names_of_characters_but_not_those_made_by_a_rule():
  (first,) = Stdlib("names", max_documents=1).scan(99)
  expected = [unicodedata.name(chr(i), "") for i in range(256)]
  assert first.content.splitlines() == [name for name in expected if name]
  everything = "".join(str(entry.content) for entry in Stdlib("names").scan(99))
  lines = set(everything.splitlines())
  assert {"SNOWMAN", "HANGUL CHOSEONG KIYEOK", "VARIATION SELECTOR-256"} <= lines
  by_rule = ("CJK UNIFIED IDEOGRAPH-", "TANGUT IDEOGRAPH-", "HANGUL SYLLABLE ")
  assert not [line for line in lines if line.startswith(by_rule)]


def test_fields_that_do_not_fit_are_refused():
  with pytest.raises(InputError, match="max_documents"):
    Stdlib(max_documents=0)
  with pytest.raises(InputError, match="root"):
    Stdlib("prose", root="x")
