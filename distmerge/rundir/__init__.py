"""The run directory: its layout, whose run it is, and who may write to it."""
