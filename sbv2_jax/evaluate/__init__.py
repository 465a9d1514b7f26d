"""How good pictures are: what networks see in them, figures of that with their intervals, protocols and reports."""
