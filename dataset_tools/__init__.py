"""Tools that make, check and review edit tuples. They import `byg_plugin`, never the reverse."""
