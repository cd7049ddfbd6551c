"""The training of the demo models: the portraits, their captions, and a recipe for each model."""
