"""Readers of files of text: one module a file type, and the table of them."""
