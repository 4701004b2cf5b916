"""Experiments on merging that the command line can run. No other package depends on this one."""
