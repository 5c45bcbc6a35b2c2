"""What survives: workers and clients killed at every moment, a soak with random faults, and what that costs."""
