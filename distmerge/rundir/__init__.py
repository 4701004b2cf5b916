"""The run directory: its layout, the identity of the run that owns it, and the lock of the job that uses it."""
