"""Specialists as Megatron-core stages, the gate, and the fusion head over all of them."""
