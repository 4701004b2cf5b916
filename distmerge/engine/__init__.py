"""Engines: how one worker computes a step and stores its parameters."""
