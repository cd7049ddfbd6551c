"""Looking at what a sweep has made: tables, metrics, plots, sheets and reports."""
