"""What happens to a joint graph: only the trained blocks get gradients."""
