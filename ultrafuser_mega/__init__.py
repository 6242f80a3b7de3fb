"""Fuse already-specialised language models into one, trained Megatron-style (UltraFuser).

cli        the ultrafuser command, one file per command
inference  answers from a fused model
convert    checkpoints from and to Hugging Face, parity between any two models
launch     how a job comes to its ranks
training   what happens between two checkpoints: the two stages, evaluation
planning   what can be known before any rank starts work
release    the model that an export ships: its own code, configuration, card
checkpoint format, read, write, integrity, what a resumed run may change
models     specialists, gate, fusion head, the fused model's stages
ops        the mixture cross-entropy, a library of its own
data       rows, templates, tokenisation, token store, class-balance sampler
reporting  what people see: records, tables, plots
runtime    devices, layouts to process groups, the exchange of hidden states
toy        small specialists made on the spot
config     every key of a run
"""
