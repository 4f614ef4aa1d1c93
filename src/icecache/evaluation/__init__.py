"""Evaluation of cache methods: tasks, fidelity to the full cache, and reports.

Nothing of the library imports this package; the command line does (``icecache eval``).
"""
