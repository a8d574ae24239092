"""What a training step can minimize beside the cross-entropy of the next token."""
