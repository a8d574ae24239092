"""Conversations to token folders: the forms that they come in, and which tokens are trained on."""
