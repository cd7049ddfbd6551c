"""Compares the library with torch and diffusers; the tests are skipped if these are not installed."""
