"""A model and example inputs in, an aten graph out, whose parameters carry their names."""
