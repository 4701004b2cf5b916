"""The command line. Each module has the verbs of one family; heavy imports wait until the flags are known to be sound."""
