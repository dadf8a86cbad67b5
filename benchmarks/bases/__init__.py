"""The builders of the tiny bases that the demos edit with."""
