"""Programs that run inside the sandbox as text: each with Python's standard library alone."""
