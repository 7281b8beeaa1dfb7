"""The model across ranks: a base class, and DDP, FSDP2 and DeepSpeed ZeRO."""
