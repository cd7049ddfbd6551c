"""Systems: what the denoiser of a family of checkpoints is, one file each."""
