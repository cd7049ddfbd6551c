"""diffusers' pipelines in words of ours: argument names, defaults and results, without a loop of their own."""
