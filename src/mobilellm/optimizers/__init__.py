"""What a step does with the gradients: optimizers, schedules, the guard."""
