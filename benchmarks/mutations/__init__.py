"""Mutations of this code, each of which must turn a test red; see `__main__`."""
