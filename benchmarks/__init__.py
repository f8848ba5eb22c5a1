"""Benchmarks of vaecodec; README.md says how each figure is made."""
