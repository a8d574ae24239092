"""Talking with a model: a dialogue, its loop in a terminal or over a pipe, and what is typed."""
