"""The command `s2ft`."""
