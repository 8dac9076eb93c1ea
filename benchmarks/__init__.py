"""Micro-benchmarks: every operator beside its named peers, with targets and floors.

``pytest benchmarks/`` measures, ``python -m benchmarks.report`` writes tables and plots. The rows
are declared in ``cases.py``; the method is described in docs/benchmarks.md.
"""
