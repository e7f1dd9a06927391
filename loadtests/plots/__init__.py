"""Plots as inline SVG text: no library, no network, readable in any browser for years. Pure.

Colours are CSS classes of the report (c0 to c7, other, good, slow, …), so that each plot suits light and dark.
"""
