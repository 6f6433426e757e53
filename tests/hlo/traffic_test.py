"""Bytes that a program moves, counted by hand for texts and for programs that are compiled."""

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.hlo.text import parse_program
from jaxmoe.hlo.traffic import movements, movements_of, program_size

TEXT = """HloModule by_hand

%sliced (p0: f32[4,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8}
}

%put (q0: f32[4,8], q1: f32[1,8], q2: s32[]) -> f32[4,8] {
  %q0 = f32[4,8]{1,0} parameter(0)
  %q1 = f32[1,8]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  %twice = f32[1,8]{1,0} add(%q1, %q1)
  ROOT %put_in = f32[4,8]{1,0} dynamic-update-slice(%q0, %twice, %q2, %none)
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %row = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced
  %new = f32[4,8]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%put
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %new)
}

%condition (t: (s32[], f32[4,8])) -> pred[] {
  %t = (s32[], f32[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(4)
  ROOT %below = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[4,8], w: f32[8,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %start = s32[] constant(0)
  %product = f32[4,8]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %given = (s32[], f32[4,8]{1,0}) tuple(%start, %product)
  %loop = (s32[], f32[4,8]{1,0}) while(%given), condition=%condition, body=%body TRIPS
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"4"}}'
ROW, WHOLE, INDEX = 8 * 4, 4 * 8 * 4, 4
DOT = WHOLE + 8 * 8 * 4 + WHOLE
PASS = 3 * INDEX + (ROW + INDEX + ROW) + (ROW + INDEX + ROW)
"""One pass of the loop: its counter, a row cut out and a row put in; the rest stays where it is."""


def test_bytes_are_those_counted_by_hand_as_often_as_the_loop_runs():
  found = list(movements_of(parse_program(TEXT.replace("TRIPS", KNOWN))))
  assert sum(one.total for one in found) == DOT + 4 * PASS
  assert all(one.known for one in found)


def test_a_loop_that_ends_when_it_likes_counts_once_and_says_so():
  text = TEXT.replace("TRIPS", "").replace("direction=LT", "direction=NE")
  found = list(movements_of(parse_program(text)))
  assert sum(one.total for one in found if one.known) == DOT
  assert sum(one.total for one in found if not one.known) == PASS


def test_an_operand_that_is_read_whole_beside_its_slices_counts_whole():
  text = TEXT.replace("TRIPS", KNOWN).replace(
    "add(%q1, %q1)", "reduce(%q0, %none), dimensions={0}, to_apply=%condition"
  )
  found = list(movements_of(parse_program(text)))
  # The update then reads all of the array that it writes a row of, and no row beside it.
  assert sum(one.total for one in found) == DOT + 4 * (PASS + WHOLE - ROW)


@pytest.mark.parametrize("layers", [2, 7])
def test_a_scan_over_stacked_weights_reads_each_of_them_once_or_more(layers):
  weights = jax.ShapeDtypeStruct((layers, 64, 64), jnp.float32)
  x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
  run = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0])
  compiled = run.lower(x, weights).compile()
  total = sum(one.total for one in movements(compiled))
  least = layers * (64 * 64 + 2 * 8 * 64) * 4
  assert least <= total <= 4 * least
  assert program_size(compiled).instructions > program_size(compiled).fusions >= 1
