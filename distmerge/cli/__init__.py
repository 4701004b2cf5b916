"""The command line. Each module has a family of verbs. Slow imports happen only after the flags have been checked."""
