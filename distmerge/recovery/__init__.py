"""Recovery from loss spikes and crashes: detect them, decide on all workers, go back, merge, and continue."""
