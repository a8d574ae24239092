"""mobilellm: from text to a language model that runs on a phone."""

__version__ = "0.1.0"
