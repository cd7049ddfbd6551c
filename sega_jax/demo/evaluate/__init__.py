"""Measures how well edits work on the demo models, as the judge sees them."""
