"""The checkpoints axis: one run's past, kept so that it can be trusted."""
