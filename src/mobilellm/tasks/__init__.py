"""Zero-shot tasks by lm-eval, on an engine of ours."""
