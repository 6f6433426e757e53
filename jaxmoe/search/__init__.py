"""Searches over frozen weights: which expert each layer should have given a token."""

from jaxmoe.search.last_token import LastToken
from jaxmoe.search.methods import METHODS, Beam, Coordinate, Exhaustive, Found, Sampled, Tried
from jaxmoe.search.methods import oracle_search as oracle_search
from jaxmoe.search.patterns import SKIP, Patterns
from jaxmoe.search.study import study

__all__ = [
  "METHODS",
  "SKIP",
  "Beam",
  "Coordinate",
  "Exhaustive",
  "Found",
  "LastToken",
  "Patterns",
  "Sampled",
  "Tried",
  "oracle_search",
  "study",
]
