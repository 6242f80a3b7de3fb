"""Specialists and fused models in from Hugging Face folders and out to them, and the proof that they are equal."""
