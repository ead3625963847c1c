"""Stage 3: which units train."""
