"""Hostile files, kills and command lines: seeded, for a sample in the tests and for whole runs."""
