"""Drafters' folders: one file a format, read, written, or refused by name."""
