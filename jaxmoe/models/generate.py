"""Writing text with a cache: a pass over the prompts, then some tokens at a time.

A row's tokens depend on its prompt, the seed and its number. Only a dispatcher that drops
(capacity) makes them depend on the other rows too, and on how a prompt is read: in chunks of 512
tokens, each with the capacity of so many, so that a longer one drops other choices than at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxmoe.core.errors import InputError, NotFiniteError
from jaxmoe.core.kept_programs import Compiler
from jaxmoe.models.next_token import Chance
from jaxmoe.models.token_writer import TokenWriter
from jaxmoe.models.transformer import Decoder, Params


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    max_tokens: The most tokens a row gets.
    temperature: Divides the logits; 0 takes the likeliest token.
    top_p: Draws from the smallest set of tokens that holds this much probability (Holtzman et al.
      2020, equation 2).
    seed: Of the draws.
  """

  max_tokens: int = 128
  temperature: float = 0.8
  top_p: float = 0.95
  seed: int = 0

  def __post_init__(self) -> None:
    if self.max_tokens < 1:
      raise InputError(f"max_tokens must be at least 1: max_tokens={self.max_tokens}")
    if not 0 <= self.temperature < float("inf"):
      raise InputError(
        f"temperature must be 0 or above and finite: temperature={self.temperature}"
      )
    if not 0 < self.top_p <= 1:
      raise InputError(f"top_p must lie in (0, 1]: top_p={self.top_p}")
    if not 0 <= self.seed < 2**32:
      raise InputError(f"seed must lie in [0, 2**32): seed={self.seed}")


def generate(
  decoder: Decoder,
  params: Params,
  prompts: Sequence[np.ndarray],
  sampling: Sampling,
  limits: tuple[int, int | frozenset[int]],
  emit: Callable[[int, int], None] = lambda row, token: None,
  compiler: Compiler | None = None,
) -> list[list[int]]:
  """Returns the new token ids of each prompt, without the end of document.

  Args:
    decoder: The model.
    params: Its parameters.
    prompts: Ids of each prompt, at least one each, each starting with the end of document id.
    sampling: How tokens are drawn.
    limits: (context length in tokens, id of the end of document, or of all that end a row). A row
      ends at either.
    emit: Called with (row, id) as soon as a token is known.
    compiler: Where programs come from, if they are kept; it is about what the decoder depends on.

  Raises:
    InputError: no prompt, an empty one, or one that leaves no room in the context.
    NotFiniteError: the model's logits are not finite.
  """
  context, ends = limits
  ends = frozenset([ends]) if isinstance(ends, int) else ends
  if not prompts:
    raise InputError("there is no prompt to continue; give at least one")
  lengths = np.array([len(prompt) for prompt in prompts])
  longest = int(lengths.max())
  for row, length in enumerate(lengths.tolist()):
    if not 0 < length < context:
      raise InputError(
        f"prompt {row} has {length} tokens; a prompt needs 1 to {context - 1} "
        f"(the context is {context} tokens)"
      )
  chance = Chance.of(sampling.temperature, sampling.top_p, sampling.seed)
  room = longest + sampling.max_tokens, context
  writer = TokenWriter(decoder, params, room, ends, chance, sampling.temperature == 0, compiler)
  found = writer.read(prompts)
  rows: list[list[int]] = [[] for _ in prompts]
  alive, written = np.ones(len(prompts), bool), 0
  while True:
    for ids_B, finite in zip(*found, strict=True):
      if not finite:
        raise NotFiniteError("the model's logits are not finite; was its training stopped in time?")
      for row in np.flatnonzero(alive).tolist():
        token = int(ids_B[row])
        alive[row] = token not in ends
        if alive[row]:
          rows[row].append(token)
          emit(row, token)
      alive &= lengths + written < context
      written += 1
    if not alive.any() or written == sampling.max_tokens:
      return rows
    found = writer.write(sampling.max_tokens - written)
