"""The checkpoints axis: blocks of a constant-rate stretch, and their average in place of annealing."""
