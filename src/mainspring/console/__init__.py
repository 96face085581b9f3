"""The web console: static files, served by the engine server."""
