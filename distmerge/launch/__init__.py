"""Launching the ranks of a job: rendezvous, signals, stopping in time, and reporting which rank failed."""
