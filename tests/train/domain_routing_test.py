import numpy as np
import pytest

from jaxmoe.train.domain_routing import mutual_information, routing_table


def oracle(table):
  """I(X; Y) = H(X) + H(Y) - H(X, Y), entropies in bits, one cell after the other."""
  total = sum(map(sum, table))

  def entropy(counts):
    return -sum(c / total * np.log2(c / total) for c in counts if c)

  columns = [sum(row[j] for row in table) for j in range(len(table[0]))]
  cells = [cell for row in table for cell in row]
  return entropy([sum(row) for row in table]) + entropy(columns) - entropy(cells)


@pytest.mark.parametrize("seed", range(5))
def test_mutual_information_is_that_of_its_definition(seed):
  table = np.random.default_rng(seed).integers(0, 9, (3, 5)).tolist()
  np.testing.assert_allclose(mutual_information(table), oracle(table), rtol=1e-9, atol=1e-12)


def test_its_bounds_are_nothing_shared_and_everything():
  assert mutual_information([[1, 2, 3], [2, 4, 6]]) == pytest.approx(0, abs=1e-12)
  assert mutual_information(np.eye(4) * 7) == pytest.approx(2)
  assert mutual_information([[0, 0], [0, 0]]) == 0


def rows_of(rng, num_rows, specialised):
  """Rows of 40 choices over 6 experts; the first half of the rows are domain 0."""
  domain_R = np.repeat([0, 1], num_rows // 2)
  p = np.array([[4, 4, 4, 1, 1, 1], [1, 1, 1, 4, 4, 4]] if specialised else [[2.5] * 6] * 2) / 15
  # Rows differ more than chance, as documents do.
  return np.stack([rng.multinomial(40, rng.dirichlet(20 * p[d])) for d in domain_R]), domain_R


@pytest.mark.parametrize("seed", range(4))
def test_domains_that_are_routed_apart_lie_above_the_band(seed):
  rows_RE, domain_R = rows_of(np.random.default_rng(seed), 40, specialised=True)
  found = routing_table(rows_RE, domain_R, ("a", "b"))
  low, high = found["shuffled_95"]
  assert low < high < found["mutual_information"]
  assert found["counts"] == {
    "a": rows_RE[:20].sum(0).tolist(), "b": rows_RE[20:].sum(0).tolist()
  }  # fmt: skip


def test_domains_that_are_routed_alike_lie_inside_the_band_about_95_times_of_100():
  inside = 0
  for seed in range(100):
    rows_RE, domain_R = rows_of(np.random.default_rng(seed), 40, specialised=False)
    found = routing_table(rows_RE, domain_R, ("a", "b"))
    low, high = found["shuffled_95"]
    inside += low <= found["mutual_information"] <= high
  assert 88 <= inside <= 100


def test_the_table_is_the_same_every_time():
  rows_RE, domain_R = rows_of(np.random.default_rng(0), 20, specialised=True)
  first, second = (routing_table(rows_RE, domain_R, ("a", "b")) for _ in range(2))
  assert first == second
