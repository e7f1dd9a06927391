"""Benchmarks anyone can run: each compares two things in one run and writes its raw figures to `benchmarks/results/`."""
