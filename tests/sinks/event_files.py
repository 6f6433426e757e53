"""TensorBoard's event files, as TensorBoard reads them."""

import pytest


def read_back(folder):
  """Returns {tag: {step: value}} and {tag: {step: histogram}} as TensorBoard reads a folder."""
  module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  everything = {module.SCALARS: 0, module.HISTOGRAMS: 0}
  seen = module.EventAccumulator(str(folder), size_guidance=everything)
  seen.Reload()
  points = {
    tag: [(point.step, point.value) for point in seen.Scalars(tag)]
    for tag in seen.Tags()["scalars"]
  }
  for tag, values in points.items():
    assert len(dict(values)) == len(values), f"{tag} has a step twice"
  histograms = {
    tag: {point.step: point.histogram_value for point in seen.Histograms(tag)}
    for tag in seen.Tags()["histograms"]
  }
  # A tag whose points were all taken back stays known.
  return {tag: dict(values) for tag, values in points.items() if values}, histograms
