"""Training and evaluation of the networks of a task."""
