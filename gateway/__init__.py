"""Serves adapters over HTTP. Imports adapters; never trainer, never torch."""
