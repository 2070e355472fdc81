"""Broken, hostile and random files for everything that is read. `python -m benchmarks.fuzz --help`."""
