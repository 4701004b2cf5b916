"""Experiments on merging that the command line can run. Nothing imports this package."""
