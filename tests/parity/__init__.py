"""Compares the library with torch and diffusers; the tests are skipped where these are not installed."""
