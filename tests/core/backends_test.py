"""The choice of back ends, on dicts of toy functions."""

import types

import jax
import pytest

from jaxmoe.core.backends import Backend, Choice, ChoiceLog, Chooser, Devices, Need, limited
from jaxmoe.core.errors import InputError

CPU, GPU = Devices("cpu", "cpu"), Devices("gpu", "NVIDIA H200")


def _few(need):
  return None if need.sizes["T"] < 4 else f"is for fewer than 4 tokens, there are {need.sizes['T']}"


BACKENDS = {
  "kernel": Backend(lambda x: x + 1, limited(("gpu",), features=("window",), dtypes=("bfloat16",))),
  "few": Backend(lambda x: x + 2, _few),
  "plain": Backend(lambda x: x + 3),
}


def chosen(chooser=None, *, dtype="bfloat16", tokens=9, features=(), **fields):
  """Returns the choices of a chooser for a need."""
  log = ChoiceLog()
  chooser = chooser or Chooser(log=log, **fields)
  backend = chooser.choose("toy", BACKENDS, dtype, {"T": tokens}, features)
  (choice,) = log.take()
  assert BACKENDS[choice.backend] is backend
  return choice


def test_auto_takes_the_first_that_fits_and_says_why_not_those_before():
  assert chosen(devices=GPU) == Choice("toy", "kernel", "the first that fits")
  assert chosen(devices=CPU, tokens=3) == Choice(
    "toy", "few", "kernel is for gpu, the devices are cpu"
  )
  assert str(chosen(devices=CPU)) == (
    "toy: plain (kernel is for gpu, the devices are cpu; few is for fewer than 4 tokens, there are "
    "9)"
  )
  assert chosen(devices=GPU, features=("window", "sinks", "lse")).why.startswith(
    "kernel has no lse, sinks; "
  )
  assert chosen(devices=GPU, dtype="float32").why.startswith("kernel takes bfloat16, not float32; ")


def test_auto_passes_by_what_fits_and_is_not_meant_for_a_need_unless_nothing_else_does():
  backends = {
    "long": Backend(lambda x: x, auto=_few),
    "kernel": BACKENDS["kernel"],
    "plain": BACKENDS["plain"],
  }
  choose = lambda backends, names=(): Chooser(CPU, names)._choice(  # noqa: E731
    "toy", backends, Need(CPU, sizes={"T": 9})
  )
  assert choose(backends) == Choice(
    "toy", "plain", "long is for fewer than 4 tokens, there are 9; kernel is for gpu, the devices "
    "are cpu",
  )  # fmt: skip
  assert choose(backends, (("toy", "long"),)) == Choice("toy", "long", "asked for")
  del backends["plain"]
  assert choose(backends).backend == "long"


def test_a_back_end_that_was_asked_for_is_taken_where_it_fits():
  assert chosen(devices=GPU, names=(("toy", "plain"),)) == Choice("toy", "plain", "asked for")
  assert chosen(devices=GPU, names=(("other", "kernel"), ("toy", "auto"))).backend == "kernel"


def test_one_that_does_not_fit_is_refused_with_the_names_of_those_that_do():
  with pytest.raises(InputError) as caught:
    chosen(devices=CPU, names=(("toy", "kernel"),))
  assert str(caught.value) == (
    "kernels.toy=kernel is for gpu, the devices are cpu; what fits: auto, plain"
  )
  with pytest.raises(InputError, match=r"kernels\.toy=nosuch: there is no such back end; known"):
    chosen(devices=CPU, names=(("toy", "nosuch"),))


def test_where_none_fits_every_reason_is_told():
  only = {"kernel": BACKENDS["kernel"], "few": BACKENDS["few"]}
  with pytest.raises(InputError, match=r"no back end fits: kernel is for gpu.*; few is for fewer"):
    Chooser(CPU).choose("toy", only, "float32", {"T": 9})


def test_a_lenient_choice_goes_back_to_auto_and_says_so():
  choice = chosen(devices=CPU, names=(("toy", "kernel"),), strict=False)
  assert choice == Choice(
    "toy", "plain", "kernel was asked for; it is for gpu, the devices are cpu"
  )


def test_the_devices_are_those_of_a_program_or_else_of_this_process():
  made = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
  assert Devices.of([made, made]) == Devices("tpu", "TPU v5 lite")
  assert Devices.here() == Devices("cpu", jax.devices()[0].device_kind)
  assert chosen() == chosen(devices=CPU)


def test_a_log_has_each_choice_once_and_is_empty_once_it_was_taken():
  log = ChoiceLog()
  chooser = Chooser(GPU, log=log)
  for tokens in (2, 9, 2):
    chooser.choose("toy", BACKENDS, "float32", {"T": tokens})
  assert [choice.backend for choice in log.take()] == ["few", "plain"]
  assert log.take() == ()


def test_choosers_that_choose_alike_are_equal_whoever_they_tell():
  assert Chooser(GPU, log=ChoiceLog()) == Chooser(GPU)
  assert hash(Chooser(GPU, log=ChoiceLog())) == hash(Chooser(GPU))
  assert Chooser(GPU) != Chooser(CPU)


def test_a_back_end_is_called_like_its_function():
  assert BACKENDS["plain"](1) == 4
  assert Need(CPU).features == frozenset()
