"""How fast model files run: here, by every runtime in turns, and on a phone."""
