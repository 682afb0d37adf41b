"""The training loop, its checkpoints and results: nothing here knows images or a teacher's mathematics."""
