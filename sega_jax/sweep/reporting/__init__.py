"""Presents a sweep's results: tables, metrics, plots, contact sheets and reports."""
