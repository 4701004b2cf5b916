"""The configuration: frozen sections, read from TOML and overridden from the command line. Imports no torch."""
