"""Tools that make, check and review edit tuples; they import `byg_plugin`, never the reverse.

Commands: generate_edits, prepare_captions, render_videos, hold_out, validate, review, judge. The other modules are their parts.
"""
