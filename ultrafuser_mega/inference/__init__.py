"""Answers from a fused model: ``ultrafuser generate`` and ``ultrafuser chat``.

model       a release folder or a checkpoint (restored) as a model in memory, placed on devices
answer      prompts to answers, with stop strings and gate weights
decoder     token by token, all specialists per step: lanes, caches, sampling, gate weights
cache       keys and values in buffers made once
sampling    how the next token is chosen
text        tokens to text as it comes, stop strings
batch       JSONL in, JSONL out
"""
