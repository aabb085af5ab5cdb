"""Measuring: the timing harness, providers side by side on the same weights and batch, and what `ddpm-fast bench` runs.

It is part of the package, so that the command works where no repository is; `benchmarks/` builds on it.
"""
