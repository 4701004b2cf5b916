"""The workers axis: merging the replicas of one run. Each algorithm's module follows the algorithm box of its paper."""
