"""Evaluation under attack: suite -> attacks -> defences -> rows -> report (``impure-fast evaluate``)."""
