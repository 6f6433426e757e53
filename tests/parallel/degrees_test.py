"""Degrees of parallelism give the mesh they say, or one line that says what would."""

import jax
import pytest

from jaxmoe.core.config_io import from_plain, to_plain
from jaxmoe.core.errors import InputError
from jaxmoe.parallel import Parallel, make_mesh


def test_one_device_is_the_mesh_of_no_degrees():
  mesh = make_mesh(Parallel(), jax.devices()[:1])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


def test_experts_are_spread_over_the_axes_that_fold_outermost_first():
  parallel = Parallel(data=2, fsdp=3, expert=5, tensor=7, fold=("tensor", "data"))
  assert parallel.expert_axes == ("data", "expert", "tensor")
  assert parallel.expert_degree == 70
  assert parallel.num_token_groups == 30
  assert parallel.num_devices == 210


def test_what_holds_other_rows_and_what_holds_other_tokens_are_two_counts():
  parallel = Parallel(data=2, expert=3, context=5, tensor=7, pipe=11)
  assert (parallel.num_row_groups, parallel.num_token_groups) == (6, 30)
  assert parallel.row_axes == ("data", "fsdp", "expert")
  assert parallel.token_axes == ("data", "fsdp", "expert", "context")


def test_stages_are_outermost_and_the_mesh_has_context_and_pipe_where_they_have_devices():
  devices = jax.devices()[:8]
  whole = ("data", "fsdp", "expert", "tensor")
  assert make_mesh(Parallel(data=2), devices).axis_names == whole
  named = make_mesh(Parallel(context=2, tensor=2), devices).axis_names
  assert named == (*whole[:3], "context", "tensor")
  mesh = make_mesh(Parallel(pipe=2, data=2, context=2), devices)
  assert mesh.axis_names == ("pipe", *whole[:3], "context", "tensor")
  assert [device.id for device in mesh.devices[0].flat] == [0, 1, 2, 3]


def test_a_file_of_before_has_no_context_and_no_stages_and_its_digest_stays():
  assert from_plain(Parallel, {"data": 2}) == Parallel(data=2)
  assert not {"context", "pipe"} & to_plain(Parallel(data=2), as_before=True).keys()


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"data": 0}, "data=0"),
    ({"sequence": True}, "sequence=false"),
    ({"fold": ("data", "data")}, "twice"),
    ({"keep": "residuals"}, "keep=residuals.* set pipe above 1, or keep=input"),
  ],
)
def test_degrees_that_make_no_sense_are_refused_in_one_line(fields, words):
  with pytest.raises(InputError, match=words) as caught:
    Parallel(**fields)
  assert "\n" not in str(caught.value)


def test_a_file_of_before_says_max_copy_gib():
  assert from_plain(Parallel, {"data": 2, "max_copy_gib": 3.0}) == Parallel(
    data=2, max_replicated_gib=3.0
  )


def test_more_devices_than_there_are_is_refused_with_the_product_that_fits():
  with pytest.raises(InputError, match=r"asks for 6 devices.*have 1; .* product is 1"):
    make_mesh(Parallel(data=2, tensor=3), jax.devices()[:1])
