"""Pure merging mathematics: tensors in, tensors out. Imports torch and nothing of ours.

A rule is written once, against ``total(x)``, the sum of ``x`` over all members: for stacked tensors ``[M, n]`` it is
``x.sum(0)``, for workers an all-reduce.
"""
