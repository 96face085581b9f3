"""Pictures with captions: encoders of both, an index of them, and answers in both directions by retrieval."""
