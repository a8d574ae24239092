"""The grid that every runtime shares, and ways to put weights on it."""
