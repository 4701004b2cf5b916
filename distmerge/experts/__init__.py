"""Merging across skills: experts that were trained separately from one base."""
