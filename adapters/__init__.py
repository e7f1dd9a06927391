"""What an adapter is: its format, its store, its registry, its gate and its merge. Imports none of the other rooms."""
