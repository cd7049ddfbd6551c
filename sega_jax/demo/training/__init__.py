"""Trains the demo models: draws portraits, writes captions, and has a training recipe for each model."""
