"""Measures how well edits work on the demo models. The judge decides which edits succeeded."""
