"""Merging across skills: models trained apart from one base."""
