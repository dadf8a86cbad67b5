"""Print the reference of all keys: `python -m byg_plugin.config > docs/configuration.md`."""

from byg_plugin.config.loading import reference

if __name__ == "__main__":
    print("# Configuration\n\nMade by `python -m byg_plugin.config > docs/configuration.md`.\n\n" + reference(), end="")
