"""Workers without a model: continuous batching and paged KV, simulated (`scheduler`), in real time (`engine`)."""
