"""Measurements of the operators and the network; ``python -m benchmarks run``."""
