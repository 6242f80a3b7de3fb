"""A fused model behind OpenAI's interface: one thread that computes, one event loop that talks to clients."""
