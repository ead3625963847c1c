"""What a prepared model holds: its slices, the state of them, and what trains them."""
