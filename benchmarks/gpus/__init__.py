"""Training on two GPUs of one host: one GPU, DDP, `torch.distributed.pipelining` and fxsplit in turns."""
