"""Checkpoint stores, and digests that tell whether the state is still the same.

digest.py            two words for an array, the same under every layout
manifest.py          what lies beside the arrays: record, shapes, digests, hash
store.py             the protocol, and how the newest intact step is found
orbax_store.py       a directory, through Orbax
step_deleter.py      old steps, gone or told of
streaming_writer.py  a step of such a directory, written array by array
memory_store.py      the memory of this process
"""

import os
from collections.abc import Callable

from jaxmoe.checkpoint.memory_store import MemoryStore
from jaxmoe.checkpoint.orbax_store import OrbaxStore
from jaxmoe.checkpoint.store import Store

# name: (class, a tiny instance for the contract test, given an empty directory)
STORES: dict[str, tuple[type, Callable[[str | os.PathLike], Store]]] = {
  "memory": (MemoryStore, lambda path: MemoryStore(keep=2)),
  "orbax": (OrbaxStore, lambda path: OrbaxStore(path, keep=2)),
}
