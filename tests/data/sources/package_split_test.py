"""The standard library is held out by packages, so that no near-copy of a file is trained on."""

import collections
import json
import pathlib
import random

import pytest

from jaxmoe.core.config_io import from_plain
from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.held_out_split import hash_fraction
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources.package_split import TWINS, package_of, split_key
from jaxmoe.data.sources.stdlib import Stdlib

DOMAINS = ("code", "prose", "names")
SIZES = json.loads(pathlib.Path(__file__).with_name("library.json").read_text())
"""Bytes of the packages and top-level modules of Python 3.11.7 outside test folders."""
IN_3_12 = {"distutils", "asynchat.py", "asyncore.py", "imp.py", "smtpd.py"}
IN_3_13 = {
  "lib2to3", "aifc.py", "cgi.py", "cgitb.py", "chunk.py", "crypt.py", "imghdr.py", "mailcap.py",
  "msilib", "nntplib.py", "pipes.py", "sndhdr.py", "sunau.py", "telnetlib.py", "uu.py", "xdrlib.py",
}  # fmt: skip
"""What 3.12 has no more, and 3.13 not either."""


def shingles(text):
  """Returns the sets of 5 words in a row, lower-cased."""
  words = text.lower().split()
  return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def twins(corpus, domain="code"):
  """Returns {held-out document: its training document with a Jaccard index above 0.7}."""
  having = collections.defaultdict(list)
  train = {document.name: shingles(document.text) for document in corpus.train(domain)}
  for name, of in train.items():
    for shingle in of:
      having[shingle].append(name)
  found = {}
  for document in corpus.held_out(domain):
    own = shingles(document.text)
    shared = collections.Counter(name for shingle in own for name in having[shingle])
    for name, count in shared.items():
      if count > 0.7 * (len(own) + len(train[name]) - count):
        found[document] = name
  return found


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  """Returns a tree with the shares of Python 3.11.7's, whose packages hold near-copies."""
  root = tmp_path_factory.mktemp("library")
  for top, size in SIZES.items():
    words = [f"w{random.Random(top).random()}{i}" for i in range(16)]
    names = [top] if top.endswith(".py") else [f"{top}/{part}.py" for part in "abc"]
    for name in names:
      text = " ".join([*words, name]) + "\n"
      text += "#" * max(0, size // 50 // len(names) - len(text))
      (root / name).parent.mkdir(exist_ok=True)
      (root / name).write_text(text)
  return str(root)


def _corpus(root, split_by):
  return open_corpus(Data((MixturePart(Stdlib(root=root, split_by=split_by)),)))


def _names(documents):
  return {document.name for document in documents}


def test_a_package_is_on_one_side_and_nothing_held_out_has_a_near_copy_in_training(library):
  corpus = _corpus(library, "package")
  held, train = (_names(side("code")) for side in (corpus.held_out, corpus.train))
  assert {package_of(name) for name in held}.isdisjoint(package_of(name) for name in train)
  assert twins(corpus) == {}
  assert twins(_corpus(library, "file"))


@pytest.mark.parametrize("gone", [set(), IN_3_12, IN_3_12 | IN_3_13], ids=["3.11", "3.12", "3.13"])
def test_between_3_and_8_percent_of_the_bytes_are_held_out(gone):
  sizes = {name: size for name, size in SIZES.items() if name not in gone}
  held = {name: size for name, size in sizes.items() if hash_fraction(split_key(name)) < 0.05}
  assert 0.03 < sum(held.values()) / sum(sizes.values()) < 0.08
  assert len(held) > 10 and max(held.values()) < sum(held.values()) / 4


def test_the_share_of_the_corpus_is_that_of_its_packages(library):
  sides = _corpus(library, "package").statistics["code"]
  held, train = sides["held_out"]["bytes"], sides["train"]["bytes"]
  assert 0.03 < held / (held + train) < 0.08


def test_a_top_level_module_is_by_itself_and_known_twins_go_together():
  assert package_of("encodings/cp437.py") == package_of("encodings/a/b.py") == "encodings"
  assert package_of("tarfile.py") == "tarfile.py" != package_of("zipfile.py")
  for group in TWINS:
    names = [pattern.replace("*", "linux") for pattern in group]
    assert len({split_key(name) for name in names}) == 1
  assert split_key("_sysconfigdata_a.py") == split_key("_sysconfigdata_b.py")


def test_a_recipe_from_before_is_split_by_file(library):
  plain = {"parts": [{"source": {"kind": "stdlib", "root": library}}]}
  assert from_plain(Data, plain).parts[0].source == Stdlib(root=library, split_by="file")
  entries = list(Stdlib(root=library, split_by="file").scan(10**6))
  assert all(entry.split_key == entry.name for entry in entries)


def test_another_way_to_split_is_refused_by_name():
  plain = {"parts": [{"source": {"kind": "stdlib", "split_by": "folder"}}]}
  with pytest.raises(InputError, match=r"split_by: unknown value 'folder'"):
    from_plain(Data, plain)


def test_a_library_of_one_package_is_refused_with_the_other_way(write_texts):
  source = Stdlib(root=write_texts({"one/a.py": "1", "one/b.py": "2"}))
  with pytest.raises(InputError, match="are one package; set split_by=file"):
    list(source.scan(99))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("domain", "split_by"), [("code", "file"), *((name, "package") for name in DOMAINS)]
)
def test_the_library_of_this_machine_has_hardly_a_twin_across_the_split(domain, split_by):
  """Prints how many there are: pytest -s -m slow tests/data/sources/package_split_test.py."""
  corpus = open_corpus(Data((MixturePart(Stdlib(domain, split_by=split_by)),)))
  held, found = corpus.held_out(domain), twins(corpus, domain)
  share = sum(len(document.text) for document in found) / sum(len(of.text) for of in held)
  sides = corpus.statistics[domain]
  print(
    f"\n{domain} by {split_by}: {len(found)} of {len(held)} held-out documents have a twin, "
    f"{share:.2%} of the characters; {sides['held_out']['bytes']:,} bytes are held out, "
    f"{sides['train']['bytes']:,} trained on"
  )
  assert share < 0.01 or split_by == "file"
