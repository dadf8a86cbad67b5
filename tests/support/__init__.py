"""What tests share: tiny models and data, stand-ins for servers and hosts, recorded values."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
