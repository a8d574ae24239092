"""Matrix products and attention for training on a CPU: operators with gradients of their own."""
