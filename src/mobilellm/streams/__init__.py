"""Bytes of files and of addresses, in pieces of a bounded size."""
