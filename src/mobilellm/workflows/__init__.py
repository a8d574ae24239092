"""Compositions of stages: quickstart, finishing a run, a measured plan."""
