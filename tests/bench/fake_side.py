"""A side that writes the ids it is told to, in no time; started as a process of its own.

`FAKE_IDS` says what comes before each row's number and place; `FAKE_ENDS` ends it at a request. Its
one operation is to take a number twice, and as often more as `FAKE_IDS` says.
"""

import atexit
import os
import sys

import numpy as np

from jaxmoe.bench.sides.protocol import serve


def handlers():
  first = int(os.environ.get("FAKE_IDS", 0))

  def write(prompts, max_tokens):
    return [[first + row + place for place in range(max_tokens)] for row in range(len(prompts))]

  def seconds(prompts, max_tokens):
    if os.environ.get("FAKE_ENDS"):
      atexit.register(lambda: print("~Server: ended", file=sys.stderr))
      raise RuntimeError("out of luck")
    return [2.0 * max_tokens, (1 + first) * max_tokens]

  def counts(rows, new, slots):
    return {"flops": float(rows * new), "bytes": float(slots)}

  def prepare(**fields):
    asked.append(fields)
    return {}

  def values(path):
    given = np.load(asked[-1]["path"])
    np.savez(path, out=(2 + first) * given["0"], **{"0": (2 + first) * given["cotangent"]})
    return {}

  asked = []
  plain = {"prepare": prepare, "versions": lambda: {"fake": "1"}, "counts": counts}
  operation = {"values": values, "passes": lambda number: [2.0 * number, 1.0 * number]}
  return {**plain, **operation, "write": write, "seconds": seconds}


if __name__ == "__main__":
  serve(("json", *filter(None, [os.environ.get("FAKE_NEEDS")])), handlers)
