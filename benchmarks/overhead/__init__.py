"""What a micro-batch costs beside its computation."""
