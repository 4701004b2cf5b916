"""The trainer: the loop, the run's parts and state, its metrics and its end."""
