"""HTTP endpoints: each parses, calls one function of a room, and answers."""
