"""Runs on small models over seeds, and what came of them: the paper's tables, and variants side by side."""
