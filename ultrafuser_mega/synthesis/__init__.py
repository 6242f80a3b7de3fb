"""Instruction data made by models behind endpoints: topics, instructions, responses (UltraFuser, section 2.2).

Everything asked and answered is in one ledger; every step is a function of the configuration, what a person edited, and
the ledger. So a run that ended, however it did, is started again and asks only what is not there yet, and a finished
one asks nothing and writes the same bytes. This room sees models through HTTP alone.

config.py says what can be configured, pipeline.py is the place to start reading.
"""
