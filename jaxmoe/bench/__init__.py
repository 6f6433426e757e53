"""Benchmarks: us against rivals, back ends against each other; values are checked first.

suites/             one file a suite: what is raced or counted
sides/              processes of contestants: ours, PyTorch with transformers, llama.cpp
page/               files of suites as one HTML file
suite.py            what a suite is asked
suite_run.py        a suite from its flags to its file
race.py             contestants in turn
results.py          the file of a suite, whole at any time
rows_text.py        the table of a race
model_shapes.py     the models of whole steps and texts
kernel_cases.py     calls of back ends, one case an operation
ideal_work.py       the least work of a program
exponents.py        how a cost grows with a size
program_counts.py   what a compiled program does
benchmark.py        expert layers beside a dense one: a benchmark
expert_layers.py    their shapes and oracles
expert_latency.py   what a row costs at each kind of expert
"""
