"""Stands in for torchaudio; see torchvision beside it."""
