"""Retrieval-augmented generation: documents in, cited answers out, each step behind a small protocol.

The workflow is that of "Searching for Best Practices in Retrieval-Augmented Generation" (arXiv 2407.01219). A
`Strategy` (strategy.py) is a frozen value that names every step; a `Pipeline` (pipeline.py) runs it over a
`DocumentIndex` (index.py).
"""
