"""Benchmarks: scripts that measure and write JSON with the environment beside it. They never assert a time."""
