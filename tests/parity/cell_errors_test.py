"""Cells of every test run are green, and an error is seen where there is one."""

import numpy as np
import pytest

from jaxmoe.moe.layer import MoEConfig
from jaxmoe.parallel import Parallel
from jaxmoe.parity import Cell, cell_errors, is_green, smoke_cells
from jaxmoe.parity.cell_errors import tree_error
from jaxmoe.parity.fixture import batch_of, decoder_of, margin, params_of


@pytest.mark.parametrize("cell", smoke_cells(), ids=lambda cell: cell.key)
def test_a_layout_gives_the_numbers_of_one_device(cell):
  errors = cell_errors(cell)
  assert is_green(errors), errors
  assert errors["grads"] > 0  # or the same program ran twice


def test_scores_of_chosen_and_unchosen_experts_lie_apart():
  decoder = decoder_of(Cell(Parallel()))
  assert isinstance(decoder.config.moe_records()[0], MoEConfig)
  assert margin(decoder, params_of(decoder), batch_of()) > 1e-4


def test_errors_are_relative_above_a_floor_and_infinite_where_not_finite():
  true = {"a": np.array([3.0, 0.0]), "b": np.array([4.0])}  # of norm 5
  assert tree_error(true, true) == 0
  assert tree_error({**true, "b": np.array([4.04])}, true) == pytest.approx(0.04 / 4.05)
  assert tree_error({**true, "a": np.array([3.0, 0.005])}, true) == pytest.approx(0.1)
  assert tree_error({**true, "b": np.array([np.nan])}, true) == np.inf


def test_nan_is_not_green():
  assert is_green({"loss": 1e-7, "grads": 9e-6})
  assert not is_green({"loss": float("nan"), "grads": 9e-6})
  assert not is_green({"loss": 1e-7, "grads": 2e-5})
  assert not is_green({"drops": 1.0})
