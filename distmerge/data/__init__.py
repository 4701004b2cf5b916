"""Reads text and instruction data, and makes batches of token ids."""
