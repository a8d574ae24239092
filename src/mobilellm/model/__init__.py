"""The network on one device, its configuration, and its own numbers. Imports nothing of the other
stages."""
