"""Devices, Megatron-core off CUDA, layouts to process groups, the exchange of hidden states, failures."""
