"""Tensors of a file, checked, and put into a network without both in memory."""
