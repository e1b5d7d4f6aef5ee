"""Training: losses, data, loop."""
