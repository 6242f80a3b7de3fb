"""Benchmarks of fused models, of specialists, and of what one would use instead."""
