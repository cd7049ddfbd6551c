"""The small model that comes along: cartoon portraits with labelled attributes, and its recipe."""
