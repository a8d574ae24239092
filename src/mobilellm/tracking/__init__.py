"""Metrics of a run in the trackers that people know."""
