"""Whatever a report shows is what metrics.jsonl and events.jsonl say."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from jaxmoe.report import write_comparison, write_report
from jaxmoe.report.expert_deaths import expert_deaths


@pytest.fixture(scope="module")
def made(run_of, page_of, tmp_path_factory):
  """Returns the lines of a run of 100 steps in which an expert dies, and its page."""
  folder = tmp_path_factory.mktemp("report") / "run"
  lines = run_of(folder, dying={3: 42, 5: 0})
  return lines, page_of(write_report(folder))


def column(lines, *path):
  values = []
  for line in lines:
    for name in path:
      line = line[name]
    values.append(math.nan if line is None else line)
  return np.array(values, float)


def floats(values):
  return np.array([math.nan if value is None else value for value in values], float)


SCALARS = {
  "Training loss": ("loss",),
  "Gradient norm": ("grad_norm",),
  "Learning rate": ("learning_rate",),
}


@pytest.mark.parametrize("title", SCALARS)
def test_a_curve_holds_the_numbers_of_the_lines_at_the_tokens_seen(made, title):
  lines, page = made
  (series,) = page.plots[title]["series"]
  np.testing.assert_allclose(floats(series["y"]), column(lines, *SCALARS[title]), rtol=1e-4)
  np.testing.assert_allclose(series["x"], np.cumsum(column(lines, "tokens")), rtol=1e-6)


LAYER_CURVES = {
  "Load entropy": "load_entropy",
  "Maximum violation": "max_violation",
  "Experts without a choice": "dead",
  "Drop rate": "drop_rate",
  "Effective k": "effective_k",
}


@pytest.mark.parametrize("title", LAYER_CURVES)
def test_the_curves_of_layers_hold_the_numbers_of_the_lines(made, title):
  lines, page = made
  curves = page.plots[title]["series"]
  assert [curve["label"] for curve in curves] == ["layer 0", "layer 1", "layer 2"]
  for n, curve in enumerate(curves):
    expected = column(lines, "layers", str(n), LAYER_CURVES[title])
    np.testing.assert_allclose(floats(curve["y"]), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("domain", ["code", "prose"])
def test_held_out_scores_stand_beside_the_compressors(made, domain):
  lines, page = made
  plot = page.plots[f"Held-out slice: {domain}"]
  scored = [line for line in lines if "eval" in line]
  (series,) = plot["series"]
  np.testing.assert_allclose(series["y"], column(scored, "eval", "domains", domain), rtol=1e-4)
  np.testing.assert_allclose(series["x"], column(scored, "step") * 128)
  expected = {"code": [2.1, 1.8], "prose": [2.9, 2.898]}[domain]
  assert plot["levels"] == {"gzip -9": expected[0], "xz -9": expected[1]}


def test_all_domains_together_weigh_by_all_of_their_held_out_bytes(made):
  lines, page = made
  scored = [line["eval"]["domains"] for line in lines if "eval" in line]
  right = [(60 * of["code"] + 180 * of["prose"]) / 240 for of in scored]
  (series,) = page.plots["Held-out slice, all domains"]["series"]
  np.testing.assert_allclose(series["y"], right, rtol=1e-4)
  assert f"held-out slice, bits/byte {right[-1]:.4g}" in page.text
  assert "Bits per byte of a slice of held-out text (66 of 240 bytes)" in page.text


SCORES = {
  "step": 90, "bits_per_byte": 2.3456, "domains": {"code": 1.4771, "prose": 2.6352}, "routing": {},
  "compressors": {"xz -9": {"code": 1.6571, "prose": 2.7}},
}  # fmt: skip


def test_scores_of_all_held_out_text_are_those_of_eval_json_where_there_is_one(
  run_of, page_of, tmp_path
):
  run_of(tmp_path)
  (tmp_path / "eval.json").write_text(json.dumps(SCORES))
  page = page_of(write_report(tmp_path))
  assert "held-out bits/byte 2.346 at step 90 held-out slice, bits/byte" in page.text
  assert "domain model xz -9 code 1.477 1.657 prose 2.635 2.7 Bits per byte of all" in page.text
  assert "all held-out text at step 90 (eval.json)" in page.text
  (curve,) = page.plots["Held-out slice: code"]["series"]
  assert curve["y"][-1] == 1.9, "of the slice"
  (tmp_path / "eval.json").write_text('{"step": 90, "domains": [')
  assert "held-out bits/byte" not in page_of(write_report(tmp_path)).text


def of_before(folder, max_bytes):
  """Makes the files of a run those of one that did not say what it scored of what it held out."""
  events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
  for event in events:
    event.get("data", {}).pop("slice", None)
  (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
  (folder / "config.json").write_text(json.dumps({"evaluation": {"max_bytes": max_bytes}}))


def test_a_run_of_before_scored_a_slice_where_more_was_held_out(run_of, page_of, tmp_path):
  run_of(tmp_path)
  of_before(tmp_path, max_bytes=98)
  page = page_of(write_report(tmp_path))
  levels = page.plots["Held-out slice: code"]["levels"]
  assert levels == {"gzip -9 (short stream)": 2.1, "xz -9 (short stream)": 1.8}
  of_before(tmp_path, max_bytes=99)
  page = page_of(write_report(tmp_path))
  assert page.plots["Held out: code"]["levels"] == {"gzip -9": 2.1, "xz -9": 1.8}
  assert "held-out bits/byte 2.4" in page.text and "slice" not in page.text


def test_the_load_of_layers_is_the_mean_over_the_last_tenth_over_the_even_share(made):
  lines, page = made
  cells = np.array(page.plots["Load by layer"]["cells"])
  for n in range(3):
    load_SE = np.array([line["layers"][str(n)]["load"] for line in lines[-10:]])
    np.testing.assert_allclose(cells[n], load_SE.mean(0) * 8, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("layer", range(3))
def test_the_load_over_time_is_that_of_the_lines_in_each_column(made, layer):
  lines, page = made
  plot = page.plots[f"Load over time, layer {layer}"]
  load_SE = np.array([line["layers"][str(layer)]["load"] for line in lines])
  cells, edges = np.array(plot["cells"]), np.array(plot["edges"]) / 128
  assert cells.shape == (8, len(edges) - 1)
  for c, (start, end) in enumerate(itertools.pairwise(edges)):
    mean_E = load_SE[round(start) : round(end)].mean(0) * 8
    np.testing.assert_allclose(cells[:, c], mean_E, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("layer", range(3))
def test_domains_and_experts_are_those_of_the_last_evaluation(made, layer):
  lines, page = made
  scored = [line["eval"]["routing"][str(layer)] for line in lines if "eval" in line]
  counts_DE = np.array(list(scored[-1]["counts"].values()))
  cells = np.array(page.plots[f"Domain x expert, layer {layer}"]["cells"])
  expected = counts_DE / counts_DE.sum(1, keepdims=True) * 8
  np.testing.assert_allclose(cells, expected, rtol=1e-3)
  plot = page.plots[f"Mutual information, layer {layer}"]["series"]
  bits = [one["mutual_information"] for one in scored]
  np.testing.assert_allclose(plot[0]["y"], bits, rtol=1e-3, atol=1e-9)
  for end, side in (("low", 0), ("high", 1)):
    band = [one["shuffled_95"][side] for one in scored]
    np.testing.assert_allclose(plot[1][end], band, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("layer", range(3))
def test_the_normalised_figure_is_over_the_smaller_entropy(made, layer):
  lines, page = made
  table = [line["eval"]["routing"][str(layer)] for line in lines if "eval" in line][-1]
  counts_DE = np.array(list(table["counts"].values()), float)
  shares = [counts_DE.sum(axis) / counts_DE.sum() for axis in (0, 1)]
  least = min(-(p * np.log2(p)).sum() for p in shares)
  found = page.plots["Mutual information, normalized"]["series"][layer]["y"][-1]
  np.testing.assert_allclose(found, table["mutual_information"] / least, rtol=1e-3)


def test_where_the_wall_time_went_is_what_the_records_say(made):
  _, page = made
  seconds = page.plots["wall time"]["seconds"]
  for name, value in {"start": 6, "compile": 4, "step": 50, "data": 10, "checkpoint": 1}.items():
    np.testing.assert_allclose(seconds[name], value, rtol=1e-4)
  np.testing.assert_allclose(sum(seconds.values()), 71, rtol=1e-4)


def test_a_stranger_is_told_which_experts_died_and_when(made):
  _, page = made
  assert "layer 1: expert 3 has had no token since step 42 (5.38k tokens)" in page.text
  assert "layer 1: expert 5 has never had a token" in page.text
  assert "layer 0: expert" not in page.text


def test_events_stand_in_the_order_in_which_they_came_though_the_clock_was_set_back(
  run_of, page_of, tmp_path
):
  run_of(tmp_path)
  events = [json.loads(text) for text in (tmp_path / "events.jsonl").read_text().splitlines()]
  for event in events[3:]:
    event["time"]["unix_s"] -= 7200
  (tmp_path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
  text = page_of(write_report(tmp_path)).text
  assert "0.0 s process" in text and "8.0 s skipped" in text and "13.0 s save_failed" in text
  assert "1 min 11 s of wall time" in text


def lines_of(loads):
  return [{"step": n, "layers": {"4": {"load": load}}} for n, load in enumerate(loads, 1)]


def test_dead_is_who_is_not_chosen_until_the_end_for_long_enough():
  alive, without_1 = [0.5, 0.5], [1.0, 0.0]
  assert expert_deaths(lines_of([alive] * 10 + [without_1] * 20)) == [(4, 1, 10)]
  assert expert_deaths(lines_of([alive] * 10 + [without_1] * 19)) == []
  assert expert_deaths(lines_of([without_1] * 30)) == [(4, 1, 0)]
  revived = [alive] * 10 + [without_1] * 40 + [alive]
  assert expert_deaths(lines_of(revived)) == []
  # 5% of a long run.
  assert expert_deaths(lines_of([alive] * 950 + [without_1] * 49)) == []
  assert expert_deaths(lines_of([alive] * 950 + [without_1] * 50)) == [(4, 1, 950)]


def test_nothing_of_a_run_becomes_markup_or_a_script(made):
  _, page = made
  assert "sample <i>100</i>" in page.text and "<b>No space</b> left" in page.text
  assert not {"i>", "b>", "u"} & {name for name, _ in page.tags}
  kinds = {attributes.get("type") for name, attributes in page.tags if name == "script"}
  assert kinds == {"application/json"}


def test_hostile_names_stay_text(run_of, page_of, tmp_path):
  evil = "</script><script>alert(1)</script>"
  lines = run_of(tmp_path / evil.replace("/", "_"))
  for line in lines:
    line["data"][evil] = line["data"].pop("code")
    if "eval" in line:
      line["eval"]["domains"][evil] = line["eval"]["domains"].pop("code")
  folder = tmp_path / evil.replace("/", "_")
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  page = page_of(write_report(folder))
  assert f"Held-out slice: {evil}" in page.plots
  kinds = {attributes.get("type") for name, attributes in page.tags if name == "script"}
  assert kinds == {"application/json"}


def test_the_page_is_whole_and_asks_nothing_of_a_network(made):
  _, page = made
  assert page.open == []
  links = [a for _, a in page.tags if "src" in a or str(a.get("href", "#"))[0] != "#"]
  assert links == []


SKIPPED = {
  "counts": {"code": {"not JSON": 1200, "<b>": 1}},
  "broken": {"prose": {"files": 2, "bytes": 34_567}},
  "places": ["a.jsonl:7: not JSON", "b.parquet: cannot be read (ends early), 34,567 bytes lost"],
}


def test_what_of_the_data_was_not_read_is_told_with_its_places(run_of, page_of, tmp_path):
  run_of(tmp_path, steps=3)
  events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
  assert "Everything could be read." in page_of(write_report(tmp_path)).text
  (start,) = (event for event in events if event["event"] == "start")
  start["data"]["skipped"] = SKIPPED
  (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
  text = page_of(write_report(tmp_path)).text
  assert "code 9 900 1 99 1,201 0 prose 9 900 1 99 0 34,567" in text
  assert "code: not JSON, 1,200 records code: <b>, 1 record" in text
  assert "prose: 2 files could not be read to the end" in text
  assert "Where a.jsonl:7: not JSON b.parquet: cannot be read" in text


def test_what_was_set_other_than_in_the_recipe_is_told(made):
  _, page = made
  assert "train.seed 0 5" in page.text


def test_samples_are_those_of_the_start_the_half_and_the_end(made):
  _, page = made
  assert all(f"sample <i>{step}</i>" in page.text for step in (0, 50, 100))
  assert "sample <i>40</i>" not in page.text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun_has_a_page(run_of, page_of, tmp_path, steps):
  run_of(tmp_path, steps=steps)
  assert page_of(write_report(tmp_path)).open == []


def test_a_folder_without_files_has_a_page(page_of, tmp_path):
  assert "not started" in page_of(write_report(tmp_path)).text


def test_lines_that_cannot_be_read_are_left_out_and_counted(run_of, page_of, tmp_path):
  lines = run_of(tmp_path)
  with open(tmp_path / "metrics.jsonl", "ab") as file:
    file.write(b'[1]\n{"step":"x"}\n\xff\xfe\n{"step":101,"lo')
  page = page_of(write_report(tmp_path))
  assert len(page.plots["Training loss"]["series"][0]["y"]) == len(lines)
  assert "could not be read" in page.text


def test_steps_without_labels_are_gaps_and_counted(run_of, page_of, tmp_path):
  lines = run_of(tmp_path)
  empty = (3, 50, 99, 100)
  for line in lines:
    if line["step"] in empty:
      line |= {"loss": None, "grad_norm": None, "total_loss": None, "labels": 0}
    line["unlabelled"] = sum(step <= line["step"] for step in empty)
  for layer in lines[49]["layers"].values():  # what a layer without a choice says
    layer |= {"load": [0.0] * 8, "load_entropy": None, "max_violation": None, "drop_rate": None}
  lines[-1]["eval"]["domains"]["code"] = None
  lines[-1]["eval"]["routing"]["0"]["counts"]["code"] = [0] * 8
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  page = page_of(write_report(tmp_path))
  for title in ("Training loss", "Gradient norm"):
    y = page.plots[title]["series"][0]["y"]
    assert [at for at, value in enumerate(y, 1) if value is None and at != 7] == [3, 50, 99, 100]
  assert page.plots["Load entropy"]["series"][0]["y"][49] is None
  assert page.plots["Held-out slice: code"]["series"][0]["y"][-1] is None
  assert set(page.plots["Domain x expert, layer 0"]["cells"][0]) == {None}
  assert "labels" not in page.plots and "unlabelled" not in page.plots
  assert "4 of 100 steps had no token with a label" in page.text
  assert f"{lines[97]['loss']:.4g}" in page.text


def test_files_of_an_older_run_have_fewer_pictures_and_no_error(run_of, page_of, tmp_path):
  lines = run_of(tmp_path)
  for line in lines:
    del line["data"], line["time"]["unix_s"]
    line.get("eval", {}).pop("routing", None)
    for layer in line["layers"].values():
      del layer["effective_k"]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (tmp_path / "events.jsonl").unlink()
  page = page_of(write_report(tmp_path))
  assert "Training loss" in page.plots and "Effective k" not in page.plots


def test_a_long_run_is_told_by_means_of_neighbours_in_a_small_file(run_of, page_of, tmp_path):
  lines = run_of(tmp_path, steps=3000)
  page = page_of(path := write_report(tmp_path))
  assert path.stat().st_size < 4e6
  (series,) = page.plots["Gradient norm"]["series"]
  values = column(lines, "grad_norm")
  width = math.ceil(3000 / 400)
  assert len(series["y"]) == math.ceil(3000 / width)
  for i, (y, low, high) in enumerate(zip(series["y"], series["low"], series["high"])):
    part = values[i * width : (i + 1) * width]
    np.testing.assert_allclose([y, low, high], [part.mean(), part.min(), part.max()], rtol=1e-3)


def test_runs_laid_over_each_other_hold_the_numbers_of_each(run_of, page_of, tmp_path):
  runs = {name: run_of(tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
  folders = [tmp_path / name for name in runs]
  page = page_of(write_comparison(folders, tmp_path / "both.html"))
  assert page.open == []
  curves = {one["label"]: one for one in page.plots["Training loss"]["series"]}
  for name, lines in runs.items():
    np.testing.assert_allclose(floats(curves[name]["y"]), column(lines, "loss"), rtol=1e-4)
  assert "Held-out slice: code" in page.text and "held-out bits/byte" not in page.text
  for folder in folders:
    (folder / "eval.json").write_text(json.dumps(SCORES))
  page = page_of(write_comparison(folders, tmp_path / "both.html"))
  assert "held-out bits/byte held-out slice, bits/byte" in page.text
  assert "Held out: code Held out: prose a" in page.text and "1.477 2.635" in page.text


STRANGE = (None, True, -1, 1e400, "x", [], [None], {}, {"a": "b"}, [[1], [2, 3]], 10**400)


@pytest.mark.parametrize("seed", range(4))
def test_no_value_of_a_wrong_type_stops_a_report(run_of, page_of, tmp_path, seed):
  run_of(tmp_path, steps=60)
  chosen = random.Random(seed)

  def damaged(value):
    if chosen.random() < 0.02:
      return chosen.choice(STRANGE)
    if isinstance(value, dict):
      return {name: damaged(of) for name, of in value.items()}
    return [damaged(of) for of in value] if isinstance(value, list) else value

  (tmp_path / "eval.json").write_text(json.dumps(SCORES))
  for name in ("metrics.jsonl", "events.jsonl", "eval.json"):
    plain = [damaged(json.loads(line)) for line in (tmp_path / name).read_text().splitlines()]
    (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in plain))
  page_of(write_report(tmp_path))
  page_of(write_comparison([tmp_path, tmp_path], tmp_path / "both.html"))
