"""Faults on purpose: `python -m tests.chaos --output FOLDER` injects them, records them and writes what they did."""
