"""Edits of whole networks that are exact and prove it, or refuse with the reason."""
