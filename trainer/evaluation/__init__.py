"""Judging a served model over HTTP, so that what is judged is what users get."""
