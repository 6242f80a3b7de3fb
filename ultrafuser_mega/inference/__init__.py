"""Answers from a fused model: everything that answers, from ``ultrafuser generate`` to a server, uses one engine.

requests      what an engine is asked and what it answers: the protocol
engine        the engine in this process: requests enter and leave a running batch at any step
prefill       prompts, read in pieces beside the answers under way
drafting      a round of all answers, in which leading specialists draft for the others
draft_length  how much of that pays
lanes         where specialists compute, side by side, and what they hold of every sequence
slots, cache  which place holds which token; keys and values there, gathered for a pass
mixing        how the specialists' logits become one distribution
sampling      how the next token is chosen from it; noise: with which randomness
text_engine   an engine's tokens as text as it comes, stop strings found
answer        prompts to answers, for a command or an evaluation
batch         JSONL in, JSONL out
scoring       how likely given texts are
model         any release, checkpoint, run or folder (address, stored) as a model in memory; devices: on which ones
"""
