"""Searches over frozen weights: which expert each layer should have given a token."""

from jaxmoe.routing_oracle.last_token import LastToken
from jaxmoe.routing_oracle.methods import (
  METHODS,
  Beam,
  Coordinate,
  Exhaustive,
  Sampled,
  SearchResult,
  Tried,
)
from jaxmoe.routing_oracle.methods import oracle_search as oracle_search
from jaxmoe.routing_oracle.patterns import SKIP, Patterns
from jaxmoe.routing_oracle.study import study

__all__ = [
  "METHODS",
  "SKIP",
  "Beam",
  "Coordinate",
  "Exhaustive",
  "LastToken",
  "Patterns",
  "Sampled",
  "SearchResult",
  "Tried",
  "oracle_search",
  "study",
]
