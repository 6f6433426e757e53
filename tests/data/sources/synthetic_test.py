"""Answers of the synthetic tasks against rules written from the task, not from its code."""

import re

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources.synthetic import Synthetic

TASKS = ("copy", "recall", "add", "brackets")


def _solve(question):
  """Returns the answer to a question, found from its text alone."""
  task, _, question = question.partition(": ")
  question = question.removesuffix(" -> ")
  if task == "copy":
    return question
  if task == "recall":
    pairs, key = question.split(" ; ")
    (value,) = re.findall(rf"\b{key}=(\d)", pairs)
    return value
  if task == "add":
    return str(sum(map(int, question.split("+"))))
  answer = ""
  while not _balanced(question + answer):
    last = _cancel(question + answer)[-1]
    answer += {"(": ")", "[": "]", "{": "}"}[last]
  return answer


def _cancel(text):
  while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)) != text:
    text = shorter
  return text


def _balanced(text):
  return _cancel(text) == ""


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [1, 4, 9])
def test_every_answer_follows_from_its_question(task, size):
  source = Synthetic(task, size=size, num_documents=200)
  entries = list(source.scan(10**6))
  assert len(entries) == 200
  for index, entry in enumerate(entries):
    text, (start, end) = entry.content, entry.answer
    assert text.isascii() and text.endswith("\n") and end == len(text) - 1
    assert _solve(text[:start]) == text[start:end] != ""
    assert (text[:start], text[start:end]) == source.example(index)


def test_a_document_depends_on_seed_and_number_alone():
  few, many = Synthetic("add", num_documents=5), Synthetic("add", num_documents=50)
  assert [few.read(i) for i in range(5)] == [many.read(i) for i in range(5)]
  assert few.read(0) != Synthetic("add", num_documents=5, seed=1).read(0)
  # Golden: python -c "print(Synthetic('add').read(0))"; only random.random() is behind it.
  assert Synthetic("add").read(0) == "add: 8442+3062 -> 11504\n"


def test_answers_reach_the_held_out_documents_and_none_is_trained_on():
  corpus = open_corpus(Data((MixturePart(Synthetic("add", size=1)),), held_out=0.1))
  trained = {d.text for d in corpus.train("add")}
  held = corpus.held_out("add")
  assert held and not trained & {d.text for d in held}
  for document in held:
    start, end = document.answer
    assert _solve(document.raw[:start].decode()) == document.raw[start:end].decode()


def test_sizes_that_make_no_task_are_refused():
  for fields in ({"size": 0}, {"num_documents": 0}, {"task": "recall", "size": 27}):
    with pytest.raises(InputError, match="size"):
      Synthetic(**fields)
