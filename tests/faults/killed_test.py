"""A run that is killed anywhere and started again ends up as if nothing had happened."""

import signal

import pytest

from tests.faults import points

PHASES = ("compile", "step", "save", "evaluation", "samples", "data")
KILL = {"do": "shoot", "number": signal.SIGKILL}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_anywhere_ends_up_undisturbed(case, phase, seed):
  case.begin(f"sigkill_in_{phase}", seed)
  case.hit(phase)
  case.recover()


@pytest.mark.slow
def test_a_run_killed_while_it_goes_on_ends_up_undisturbed(case, broken_off, seed):
  case.begin("sigkill_in_restore", seed)
  case.hit("restore", before=broken_off)
  assert "going on from step 4" in case.recover().out


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_up_undisturbed(case, seed):
  rng = case.begin("sigkill_again_and_again", seed)
  case.hit(rng.choice(PHASES))
  phases = rng.choices((*PHASES, "restore"), k=4)
  codes = [case.run({**KILL, "at": points.draw(phase, rng)}).code for phase in phases]
  assert set(codes) <= {0, -signal.SIGKILL}, codes
  case.recover()
