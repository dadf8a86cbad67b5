"""Editing with a trained LoRA: the pipeline, what the command line asks of it, and what is written."""
