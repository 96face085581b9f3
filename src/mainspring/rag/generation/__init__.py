"""From passages to an answer: language models, summaries, citations, abstention."""
