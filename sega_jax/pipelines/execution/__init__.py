"""Runs compiled programs: distributes rows over devices, splits schedules into chunks, and selects active concepts."""
