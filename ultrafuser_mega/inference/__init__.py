"""Answers from a fused model: ``ultrafuser generate`` and ``ultrafuser chat``.

load        a release folder or a checkpoint as a model in memory, placed on devices
decoder     token by token, all specialists per step: lanes, caches, sampling, gate weights
cache       keys and values in buffers made once
sampling    how the next token is chosen
text        tokens to text as it comes, stop strings
batch       JSONL in, JSONL out
terminal    streaming and coloured output, the conversation at the prompt
commands    the two commands' options
"""
