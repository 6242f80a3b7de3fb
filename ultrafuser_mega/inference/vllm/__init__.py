"""The fused model on vLLM: an engine process for each specialist, in lock-step, all choosing the same token.

Every specialist is an ordinary vLLM engine with its own prompt, paged cache, tensor parallel size and devices. Only
``compute_logits`` is ours: there the engines send the hidden states behind every answer to the first one, which applies
gate and heads, chooses as every engine of this package does, and tells the token to all; vLLM's sampler then finds
nothing to choose.

engine     the engine, as ``requests`` has it: admits requests where every specialist has room, steps the processes
room       how much every specialist's cache has room for, and how much a step reads
processes  the engine processes: started, waited for, ended together, each named where it fails
process    what runs in one of them
models     vLLM's model classes of the families that can be fused, with our ``compute_logits``
loader     their weights, read from a release or a checkpoint as everything here reads them
exchange   hidden states to the first engine, tokens back, with the requests that they belong to
plugin     what vLLM learns of all this (entry point ``vllm.general_plugins``)

Only ``models``, ``loader`` and ``process`` import vLLM.
"""
