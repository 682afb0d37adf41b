"""The teacher in training frameworks, and the training tasks of the examples."""
