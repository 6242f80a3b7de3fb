"""lm-evaluation-harness with our models in it, and its tasks on local files."""
