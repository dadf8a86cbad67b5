"""How good edits are: items, metrics, scores, tables and pages. The command is `byg_plugin/evaluate.py`."""
