"""Models on disk, read and written chunk by chunk; windows and merges of experts both use these modules."""
