"""The trainer: the training loop, the run's components and state, its metrics, and what happens when it ends."""
