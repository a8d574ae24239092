"""What verbs share on a terminal: output, progress, notes, help of fields."""
