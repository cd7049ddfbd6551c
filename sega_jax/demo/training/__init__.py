"""Trains the demo models. The package draws portraits, writes captions, and has a training recipe for each model."""
