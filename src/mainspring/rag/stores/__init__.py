"""Where passages and vectors live: a protocol, LanceDB embedded, Milvus as a server."""
