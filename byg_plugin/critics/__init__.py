"""Frozen judges of an edit whose answer is differentiable with respect to the edited picture."""
