"""Data sets: fetched from packages or a user's own, always chat rows in JSONL."""
