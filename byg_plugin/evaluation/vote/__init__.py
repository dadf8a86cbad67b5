"""The blind vote between two runs (paper, Appendix E). The command is `python -m byg_plugin.evaluation.vote`."""
