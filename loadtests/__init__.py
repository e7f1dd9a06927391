"""Measures a served model over HTTP only. Imports none of the other rooms."""
