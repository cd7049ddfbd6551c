"""Deliberate faults in the library, each of which a view of its behaviour has to show."""
