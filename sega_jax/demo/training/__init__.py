"""Trains the demo models. It draws portraits, writes captions, and has a training recipe for each model."""
