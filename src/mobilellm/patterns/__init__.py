"""What the regular expressions of others may cost."""
