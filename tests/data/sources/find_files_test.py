"""Which files a path stands for, for every source of folders: each real file once."""

import glob
import os
import pathlib
import shutil

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.sources import SOURCES, Stdlib, TextFiles
from jaxmoe.data.sources.find_files import find_files
from jaxmoe.data.sources.mixed_files import sources_of
from jaxmoe.data.sources.text_files import read_text

FILES = {"a.txt": "a", "b/c.txt": "c", "b/d.md": "d", "b/e[1].txt": "e"}
HIDDEN = {".h/a.txt": "a", "b/.h.txt": "h", "B/f.txt": "f", "b/z/y/g.txt": "g"}
PATTERNS = ("*", "**", "*.txt", "**/*.txt", "*/*.txt", "b/**/*.txt", "b/.*", "[bB]/*.txt",
            "**/y/*", "./b/*", "b/e[[]1].txt", "nothing/*", "**/z/**/*")  # fmt: skip
FOLDERS = ("text", "jsonl", "parquet", "arrow", "stdlib")
"""The sources that read a folder."""


def _names(path, **options):
  return [name for name, _ in find_files(path, (".txt",), **options)]


def test_a_folder_stands_for_the_text_files_below_it(write_texts):
  folder = write_texts({**FILES, **HIDDEN})
  expected = ["B/f.txt", "a.txt", "b/c.txt", "b/e[1].txt", "b/z/y/g.txt"]
  assert _names(folder) == _names(folder, as_found=True) == expected


def test_a_glob_counts_from_its_folder_without_wildcards(write_texts):
  folder = write_texts(FILES)
  assert _names(os.path.join(folder, "**", "*.txt")) == ["a.txt", "b/c.txt", "b/e[1].txt"]
  assert _names(os.path.join(folder, "b", "*.md")) == ["d.md"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_glob_without_links_stands_for_what_module_glob_finds(write_texts, monkeypatch, pattern):
  folder = write_texts({**FILES, **HIDDEN})
  monkeypatch.chdir(folder)
  for path in (pattern, f"{folder}/{pattern}"):
    expected = {item for item in glob.glob(path, recursive=True) if os.path.isfile(item)}
    if expected:
      assert {item for _, item in find_files(path, (".txt",))} == expected
    else:
      with pytest.raises(InputError, match=r"no \.txt file at"):
        find_files(path, (".txt",))


def test_a_file_stands_for_itself_even_with_brackets_in_its_name(write_texts):
  folder = write_texts(FILES)
  assert _names(os.path.join(folder, "b", "e[1].txt")) == ["e[1].txt"]
  assert _names(write_texts(FILES, "odd[1]")) == ["a.txt", "b/c.txt", "b/e[1].txt"]


def test_a_folder_without_text_files_is_refused(write_texts):
  with pytest.raises(InputError, match=r"no \.txt file"):
    list(TextFiles(write_texts({"a.md": "a"})).scan(9))


@pytest.fixture
def folder_of(request, write_texts, tmp_path):
  """Returns a function from a kind of source to (its class, folder, suffix): `a` and `b/c`."""

  def make(kind):
    suffix = {"text": ".txt", "stdlib": ".py"}.get(kind, f".{kind}")
    if kind in ("parquet", "arrow"):
      write_rows = request.getfixturevalue("write_rows")
      folder = pathlib.Path(write_rows(f"a{suffix}", ["x", "y"]))
      (folder / "b").mkdir()
      shutil.copy(folder / f"a{suffix}", folder / "b" / f"c{suffix}")
    else:
      text = '{"text": "x"}\n{"text": "y"}\n'
      folder = pathlib.Path(write_texts({f"a{suffix}": text, f"b/c{suffix}": text}))
    return SOURCES[kind][0], folder, suffix

  return make


def _source(cls, folder, **fields):
  return cls(root=str(folder)) if cls is Stdlib else cls(str(folder), **fields)


@pytest.mark.parametrize("kind", FOLDERS)
def test_each_real_file_is_read_once_whatever_links_lead_to_it(folder_of, kind):
  cls, folder, suffix = folder_of(kind)
  without = [entry.name for entry in _source(cls, folder).scan(99)]
  (folder / "loop").symlink_to(".")
  (folder / "b" / "up").symlink_to("..")  # with the other, 2^40 paths
  (folder / "A").symlink_to("b")
  (folder / f"Z{suffix}").symlink_to(f"a{suffix}")
  assert [entry.name for entry in _source(cls, folder).scan(99)] == without
  if cls is not Stdlib:
    names = {entry.name.split(":")[0] for entry in cls(f"{folder}/**/*{suffix}").scan(99)}
    assert names == {f"a{suffix}", f"b/c{suffix}"}


def test_a_file_with_two_names_of_links_alone_goes_by_the_first(write_texts):
  folder = pathlib.Path(write_texts({"z.md": "z"}))
  for name in ("b.txt", "a.txt"):
    (folder / name).symlink_to("z.md")
  assert _names(str(folder)) == ["a.txt"]
  assert _names(str(folder), as_found=True) == ["a.txt", "b.txt"]


def test_a_glob_reaches_files_by_the_link_it_names(write_texts):
  folder = pathlib.Path(write_texts(FILES))
  (folder / "link").symlink_to("b")
  assert _names(f"{folder}/li*/c.txt") == ["link/c.txt"]


def test_a_link_to_nothing_is_a_file_that_cannot_be_read(write_texts):
  folder = pathlib.Path(write_texts({"a.txt": "a", "a.jsonl": '{"text": "x"}'}))
  for suffix in ("txt", "jsonl"):
    (folder / f"b.{suffix}").symlink_to("not-mounted")
  _, entry = TextFiles(str(folder)).scan(9)
  assert (entry.name, entry.error) == ("b.txt", "cannot be read (No such file or directory)")
  _, entry = SOURCES["jsonl"][0](str(folder)).scan(99)
  assert (entry.name, entry.lost_bytes) == ("b.jsonl", 0)


def test_a_folder_that_cannot_be_listed_is_named(write_texts, monkeypatch):
  folder = write_texts(FILES)

  def listdir(path):
    if path.endswith("b"):
      raise PermissionError(13, "Permission denied", path)
    return real(path)

  real = os.listdir
  monkeypatch.setattr(os, "listdir", listdir)
  with pytest.raises(InputError, match=r"/b: cannot be listed \(Permission denied\)"):
    find_files(folder, (".txt",))


def test_a_pipe_in_a_folder_blocks_no_one(write_texts):
  folder = write_texts({"a.txt": "a", "b.py": "b", "c.py": "c"})
  for name in ("pipe.txt", "pipe.py"):
    os.mkfifo(os.path.join(folder, name))
  assert [one.name for one in TextFiles(folder).scan(9)] == ["a.txt"]
  groups, _ = sources_of(folder)
  assert sorted(one.name for group in groups for one in group.scan(9)) == ["a.txt", "b.py", "c.py"]
  found = {one.name: one.error for one in Stdlib(root=folder, split_by="file").scan(9)}
  assert found == {"b.py": "", "c.py": "", "pipe.py": "cannot be read (not a regular file)"}
  with pytest.raises(OSError, match="not a regular file"):
    read_text(os.path.join(folder, "pipe.txt"))
