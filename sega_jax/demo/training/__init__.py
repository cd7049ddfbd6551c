"""The recipes of the demo models: the drawn portraits, their captions and the training loops."""
