"""Theta, what merges: one vector of a model's trainable parameters, and the buffers that go with it."""
