"""Checkpoints of one run: written atomically, verified before they are trusted, readable in another layout."""
