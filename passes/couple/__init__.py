"""Stage 2: which axes of a traced model may be permuted, proved by axis inference."""
