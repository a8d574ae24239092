"""What GGUF holds beside its weights: the header, and a tokenizer as keys."""
