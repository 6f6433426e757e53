"""Benchmarks: back ends against a dense layer of equal FLOPs, values checked first."""
