"""The version of this package, in a module that imports nothing, so that every room may read it."""

__version__ = "0.2.0"
