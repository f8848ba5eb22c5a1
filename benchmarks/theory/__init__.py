"""The theory of the codec as experiments."""
