"""The processes of a run: the network among them, and who is missing."""
