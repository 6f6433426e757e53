"""Searches over frozen weights: which expert each layer should have given a token."""

from jaxmoe.routing_oracle.drawn_tokens import draw_tokens
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
from jaxmoe.routing_oracle.study_page import study_page

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
  "draw_tokens",
  "oracle_search",
  "study",
  "study_page",
]
