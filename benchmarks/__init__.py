"""Micro-benchmarks of the operators against named peers, with floors. Run with ``pytest
benchmarks/``.
"""
