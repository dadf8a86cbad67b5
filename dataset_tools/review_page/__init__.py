"""The review page: its server, the journal of decisions, the export. The command is `dataset_tools/review.py`."""
