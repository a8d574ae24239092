"""Text to token folders."""
