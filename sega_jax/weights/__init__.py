"""Files to parameters and back. Nothing here knows which family a checkpoint belongs to."""
