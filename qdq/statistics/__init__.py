"""Calibration runs: what is observed, gathered on many workers, and kept."""

from qdq.statistics.summary import Statistics

__all__ = ["Statistics"]
