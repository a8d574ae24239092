"""Ablations with paired seeds and intervals, and the best shape for a device."""
