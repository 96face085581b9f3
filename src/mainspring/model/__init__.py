"""The one decoder, its rotary embedding, and its loading and saving."""
