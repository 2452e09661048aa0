"""Checkpoint files: reading and writing them, their weights, other libraries' formats."""
