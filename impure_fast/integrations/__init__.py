"""Purifier and pipeline in the forms that attack libraries and benchmarks expect."""
