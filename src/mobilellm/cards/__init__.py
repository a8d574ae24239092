"""What is written beside a model for its readers: the card of a Hugging Face folder."""
