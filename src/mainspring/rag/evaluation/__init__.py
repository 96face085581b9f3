"""Measures with their uncertainty, and the data they are taken on."""
