"""The training loop: recipe, optimizer, schedule, checkpoints, run folder."""
