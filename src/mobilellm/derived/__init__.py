"""What a model says of data, computed once and kept: a reference's log-probabilities, a teacher's
distributions."""
