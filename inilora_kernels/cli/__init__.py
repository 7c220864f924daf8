"""The command line: `inilora`."""
