"""What the compressors cost in time and memory, and what they lose."""
