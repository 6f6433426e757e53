from jaxmoe.parallel.dim_factors import MISALIGNED, fresh, mark, regroup, resolve, size_of, unify


def sizes(dim):
  return [factor.size for factor in resolve(dim)]


def test_a_reshape_splits_a_dim_everywhere_outer_part_first():
  (merged,) = fresh([24])
  heads, head = regroup([merged], [4, 6])
  assert sizes(merged) == [4, 6]
  assert resolve(merged) == resolve(heads) + resolve(head)


def test_united_dims_are_split_where_either_is():
  a, b = fresh([24, 24])
  regroup([a], [8, 3])
  regroup([b], [2, 12])
  unify(a, b)
  assert sizes(a) == sizes(b) == [2, 4, 3]
  assert resolve(a) == resolve(b)


def test_one_dim_that_repeats_inside_another_ends():
  a, b = fresh([4, 2])
  unify(a + b, b + a)
  assert size_of(resolve(a + b)) == 8


def test_boundaries_that_do_not_meet_are_marked():
  a, b = fresh([6, 6])
  regroup([a], [2, 3])
  regroup([b], [3, 2])
  unify(a, b)
  assert all(MISALIGNED in factor.marks for factor in resolve(a) + resolve(b))
  (c,) = fresh([12])
  regroup([c], [4, 3])
  made = regroup([c], [3, 4])
  assert [size_of(dim) for dim in made] == [3, 4]
  assert all(MISALIGNED in factor.marks for factor in resolve(c))


def test_marks_reach_parts_and_whatever_was_united():
  a, b = fresh([8, 8])
  mark(a, "before")
  regroup([a], [2, 4])
  unify(a, b)
  mark(b, "after")
  assert all({"before", "after"} <= factor.marks for factor in resolve(a))


def test_sizes_of_one_and_none_have_no_factors_to_share():
  one, row = fresh([1, 5])
  assert one == ()
  assert regroup([one, row], [5, 1, 1]) == [row, (), ()]
  assert [size_of(dim) for dim in regroup(fresh([0, 3]), [3, 0])] == [3, 0]
