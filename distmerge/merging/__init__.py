"""Merging models on disk or in memory: recipes, what they pair, and their execution."""
