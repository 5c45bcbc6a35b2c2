"""Training steps over a slow link, against `torch.distributed.pipelining` in the same run."""
