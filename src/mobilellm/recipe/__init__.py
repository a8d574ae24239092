"""A training run as settings."""
