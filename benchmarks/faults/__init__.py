"""Faults, done to the obvious Ray Data and Lance job and to Tessera: `python -m benchmarks.faults [NAME ...]`."""
