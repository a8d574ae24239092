"""Calls of functions: their schemas, output held to a schema, calls read from text, and scores."""
