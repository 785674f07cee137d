"""Measured comparisons: `python -m benchmarks NAME`. A number counts only when a run here printed it with its rival."""
