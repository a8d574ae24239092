"""The training loop: recipe, optimiser, schedule, checkpoints, run folder."""
