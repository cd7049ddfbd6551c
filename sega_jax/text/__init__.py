"""Words to tokens, without networks."""
