"""Merging models on disk or in memory: recipes, the pairing of their tensors, and their execution."""
