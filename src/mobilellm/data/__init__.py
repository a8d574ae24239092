"""Text to tokens on disk to batches in an exact order. Knows no network."""
