"""What a chart says besides its numbers: whose a curve is, its last value, where axes begin."""

import itertools
import json
import math

import pytest

from jaxmoe.report import write_comparison, write_report
from jaxmoe.report.card_grid import first_cards, grid
from jaxmoe.report.chart import (
  BOTTOM,
  HEIGHT,
  LINE,
  TOP,
  Axes,
  ReferenceLine,
  Series,
  chart,
  spread_labels,
)
from jaxmoe.report.html import table
from jaxmoe.report.number_format import short


def rewrite(folder, change):
  """Changes the lines of metrics.jsonl in place."""
  path = folder / "metrics.jsonl"
  lines = [json.loads(text) for text in path.read_text().splitlines()]
  for line in lines:
    change(line)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_last_is_the_value_of_the_last_step_and_no_mean(run_of, page_of, tmp_path):
  lines = run_of(tmp_path / "long", steps=1203)  # four steps a point, the last of three
  lines[-1]["grad_norm"] = 7.5
  rewrite(tmp_path / "long", lambda line: line.update(lines[line["step"] - 1]))
  run_of(tmp_path / "short", steps=20)
  page = page_of(write_report(tmp_path / "long"))
  (series,) = page.plots["Gradient norm"]["series"]
  assert series["last"] == 7.5 != series["y"][-1]
  loss = short(lines[-1]["loss"])
  assert f"loss, nats/token {loss} " in page.text
  assert f"Training loss nats per token log x and y last {loss} " in page.text
  for layer in page.plots["Load entropy"]["series"]:
    (number,) = [lines[-1]["layers"][str(n)] for n in range(3) if layer["label"] == f"layer {n}"]
    assert layer["last"] == number["load_entropy"]
  both = [tmp_path / "long", tmp_path / "short"]
  compared = page_of(write_comparison(both, tmp_path / "both.html"))
  assert f"long {loss} " in compared.text


def test_a_step_without_a_value_leaves_the_last_one_that_is_known(run_of, page_of, tmp_path):
  lines = run_of(tmp_path, steps=20)
  rewrite(tmp_path, lambda line: line.update({"loss": None} if line["step"] > 15 else {}))
  (series,) = page_of(write_report(tmp_path)).plots["Training loss"]["series"]
  assert series["last"] == pytest.approx(lines[14]["loss"], rel=1e-5)
  assert series["y"][-1] is None


def test_all_axes_of_a_page_begin_and_end_alike(run_of, page_of, tmp_path):
  run_of(tmp_path / "a", steps=100)
  run_of(tmp_path / "b", steps=60)
  page = page_of(write_report(tmp_path / "a"))
  curves = {title: plot for title, plot in page.plots.items() if "series" in plot}
  assert len(curves) > 10
  assert {tuple(plot["ends"]) for plot in curves.values()} == {(0, 12_800)}
  # The first evaluation is of step 25; the axis begins at 0 all the same.
  assert curves["Held-out slice: code"]["series"][0]["x"][0] == 25 * 128
  both = page_of(write_comparison([tmp_path / "b", tmp_path / "a"], tmp_path / "both.html"))
  ends = {tuple(plot["ends"]) for plot in both.plots.values() if "series" in plot}
  assert ends == {(0, 12_800)}


def test_a_single_curve_among_several_runs_says_whose_it_is(run_of, page_of, tmp_path):
  for name in ("scored", "unscored"):
    run_of(tmp_path / name)
  rewrite(tmp_path / "unscored", lambda line: line.pop("eval", None))
  folders = [tmp_path / "unscored", tmp_path / "scored"]
  page = page_of(write_comparison(folders, tmp_path / "both.html"))
  (series,) = page.plots["Held-out slice: code"]["series"]
  assert series["label"] == "scored"
  assert "Held-out slice: code bits per byte scored 1.9" in page.text


def test_one_layer_alone_is_named(run_of, page_of, tmp_path):
  run_of(tmp_path)
  rewrite(tmp_path, lambda line: line.update(layers={"1": line["layers"]["1"]}))
  assert "Load entropy share of log(experts) layer 1 " in page_of(write_report(tmp_path)).text


def test_a_comparison_has_no_card_without_a_number(run_of, page_of, tmp_path):
  for name in ("a", "b"):
    run_of(tmp_path / name)
    rewrite(tmp_path / name, lambda line: [line.pop(key, None) for key in ("layers", "grad_norm")])
  page = page_of(write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html"))
  assert "Gradient norm" not in page.plots and "Load entropy" not in page.text
  assert "Experts, mean over layers no numbers yet" in page.text


@pytest.mark.parametrize(
  "values",
  [[1.451, 1.333], [5.0, 4.98], [2.9, 2.88, 2.86], [1.0], [1 + i / 100 for i in range(8)], [3.0]],
)
def test_names_of_levels_stand_within_the_axes_and_apart(values):
  text = chart(
    "x", [Series("", [1, 2], [3, 2.7])], levels=[ReferenceLine(f"n{y}", y) for y in values]
  )
  places = [float(piece.split('y="')[1].split('"')[0]) for piece in text.split("<text")[1:]
            if "halo" in piece.split("</text>")[0]]  # fmt: skip
  assert len(places) == len(values)
  assert all(TOP - 2 <= y <= HEIGHT - BOTTOM - 3 for y in places)
  assert all(below - above >= LINE for above, below in itertools.pairwise(sorted(places)))


def test_names_that_have_room_stay_where_they_want():
  assert spread_labels([20, 60, 100]) == [20, 60, 100]
  assert spread_labels([20, 25]) == [20, 20 + LINE]


def test_without_ends_an_axis_goes_as_far_as_its_curves():
  text = chart("x", [Series("a", [5, 6], [1, 2])], Axes())
  assert '"ends"' not in text and "a <b>2</b>" in text
  assert "last" in chart("x", [Series("", [5, 6], [1, math.nan])], Axes())


def test_a_grid_has_no_place_for_nothing():
  assert grid(None, None) is None
  assert grid("a", None, "b").count("a") == grid("a", "b").count("a")
  assert first_cards(["a", None, "b"], 2, "x") == grid("a", "b")
  assert "1 more x" in first_cards(["a", None, "b", "c"], 2, "x")


def test_a_table_that_is_too_wide_for_a_phone_is_a_list_of_names_and_values_there():
  head = ["run", *(f"column {i}" for i in range(8))]
  wide = table(head, [["a", *map(str, range(100_000, 100_008))]])
  narrow = table(["domain", "model", "xz -9"], [["code", "1.265", "1.8"]])
  assert 'data-name="column 3"' in wide and "<th>column 3</th>" in wide
  below = [int(text.split('class="below')[1].split('"')[0]) for text in (narrow, wide)]
  assert below[0] <= 400 < 640 <= below[1]


@pytest.mark.parametrize(
  "step, planned, shown",
  [(1500, 1500, "1,500 of 1,500"), (100, 1_500_000, "100 of 1,500,000"), (7, None, "7"),
   (123_456, 1_000_000, "123.5k of 1M")],
)  # fmt: skip
def test_steps_fit_a_tile(run_of, page_of, tmp_path, step, planned, shown):
  run_of(tmp_path, steps=1)
  rewrite(tmp_path, lambda line: line.update(step=step))
  (tmp_path / "config.json").write_text(json.dumps({"train": {"num_steps": planned}}))
  assert f"step {shown} tokens" in page_of(write_report(tmp_path)).text
