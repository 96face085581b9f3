"""Files as text with places: one file per format, found by suffix in `reading.py`."""
