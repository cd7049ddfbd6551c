"""What tests of several rooms share: small checkpoints, recorded results, and stand-ins."""
