"""Deliberate faults in the library. The tests check that a view of the library's behaviour shows each of them."""
