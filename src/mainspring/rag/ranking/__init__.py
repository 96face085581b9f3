"""Ordering passages: rerankers and repacking."""
