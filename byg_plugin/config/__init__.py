"""The typed configuration, on which every room stands: sections, loading, extras that it needs, the device."""
