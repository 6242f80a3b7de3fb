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

import logging
import warnings

# Megatron-core warns at import, once per rank, about every optional accelerator that is not installed, and later
# about CUDA settings that mean nothing on a CPU. `ultrafuser doctor` tells what was found.
warnings.filterwarnings("ignore", module=r"megatron\.core")
# What Megatron-core 0.16 uses of torch and newer torch versions announce to replace.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=r"Please use DTensor instead", category=FutureWarning)
# A CUDA build of torch on a machine with nvcc and without a GPU, from every rank.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.getMessage())
