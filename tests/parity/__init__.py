"""The library beside torch and diffusers: every test here is skipped where they are not installed."""
