"""Perplexity, zero-shot tasks, and baselines to set them against."""
