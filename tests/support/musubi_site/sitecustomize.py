"""Put on PYTHONPATH of the tests' child processes: a CPU stand-in for what the host imports, and tiny models for its names."""

import os

import musubi_stubs

musubi_stubs.install()
if os.environ.get("BYG_TINY_HOST"):
    musubi_stubs.look_first()
    musubi_stubs.shrink()
