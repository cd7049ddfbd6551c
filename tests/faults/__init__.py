"""Deliberate faults in the library. For each fault, a test checks that a view of the library's behaviour shows it."""
