"""Merging inside other people's training loops."""
