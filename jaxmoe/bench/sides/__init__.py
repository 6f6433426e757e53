"""Sides of a race that have a process of their own, and Python of their own if need be.

protocol.py   requests and answers, a JSON object a line
process.py    the process of a side, as the suite sees it
own.py        jaxmoe
torch.py      PyTorch with transformers
llama_cpp.py  llama.cpp, by the wheel xllamacpp
gguf.py       a checkpoint as the file that llama.cpp reads
"""
