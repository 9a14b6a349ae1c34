"""Exported models, for both engines: a file of each format, its metadata, and its agreement with torch."""
