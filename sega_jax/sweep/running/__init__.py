"""Runs plans, and stores their pictures and records."""
