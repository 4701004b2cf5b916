"""Models on disk, read and written chunk by chunk. Windows and experts both merge through these rooms."""
