"""Checkpoints: format, read, write, integrity, what they keep of their sources, and what a resumed run may change."""
