"""The workers axis: merging the replicas of one run. Each algorithm's file reads like its paper's box."""
