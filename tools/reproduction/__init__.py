"""The paper's tables and figures on small models: what to run, what was measured, which claims hold."""
