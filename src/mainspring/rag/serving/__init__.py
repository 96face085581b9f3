"""An index for many clients: an HTTP API, and tools for agents over MCP."""
