"""What a run does when its loss spikes or it has crashed: detect it, agree on it, go back, merge and continue."""
