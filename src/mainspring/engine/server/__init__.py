"""The OpenAI-compatible HTTP server and the process that runs the engine behind it."""
