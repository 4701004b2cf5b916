"""The configuration: frozen sections, read from TOML files and overridden on the command line. Imports no torch."""
