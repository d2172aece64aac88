"""Models behind a vLLM server: tokens go there and come back, text never does."""
