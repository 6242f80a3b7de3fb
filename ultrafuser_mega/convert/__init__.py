"""Specialists and fused models in from Hugging Face folders and out to them, and the proof that they are equal."""

#: What models are compared on, beside random tokens.
SAMPLE_TEXT = "The quick brown fox jumps over the lazy dog. def add(a, b): return a + b. 12 * 7 = 84."
