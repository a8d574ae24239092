"""Tasks as processes whose results lie on disk; it knows no task."""
