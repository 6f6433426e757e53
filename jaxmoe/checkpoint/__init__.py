"""Checkpoint stores, and digests that tell whether the state is still the same.

digest.py            two words for an array, the same under every layout
manifest.py          what lies beside the arrays: record, shapes, digests, hash
store.py             the protocol, and how the newest intact step is found
store_kinds.py       the visible dict, and the store of a folder by what is there
directory_store.py   steps as folders, whatever they hold
orbax_store.py       such a directory, through Orbax
step_reader.py       a step read array by array on the host
step_listing.py      the steps of a folder, whole or not
step_difference.py   two steps told apart array by array
step_deleter.py      old steps, gone, or why they stay
streaming_writer.py  a step of Orbax's, written array by array
npz_store.py         such a directory, of plain files, for one process
read_error.py        damage, or a reason that may pass
memory_store.py      the memory of this process
inert_pickle.py      pickles read as plain data, nothing run
torch_file.py        tensors in what torch.save wrote
torch_dcp.py         tensors in folders of torch.distributed.checkpoint
deepspeed_zero.py    weights in shards of DeepSpeed's ZeRO
"""

from jaxmoe.checkpoint.memory_store import MemoryStore
from jaxmoe.checkpoint.store import LazyArray, Store
from jaxmoe.checkpoint.store_kinds import STORES, open_store

__all__ = ["STORES", "LazyArray", "MemoryStore", "Store", "open_store"]
