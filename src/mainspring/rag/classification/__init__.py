"""Whether a question needs the documents at all: made examples, a small model on the embedder, its test."""
