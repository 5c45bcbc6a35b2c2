"""Training with a client on the CPU and a server on a GPU, through every compressor."""
