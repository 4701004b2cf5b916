"""Pure merging mathematics: tensors in, tensors out. Imports nothing of ours but the user's errors.

A rule is written once, over blocks of the members (``protocol``), and has its name in one place (``catalogue``). How the
members of a block come together, from files, in memory or from workers, is not its business.
"""
