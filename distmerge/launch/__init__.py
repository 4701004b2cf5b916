"""From one command to many ranks: rendezvous, signals, leaving in time, and saying which rank failed."""
