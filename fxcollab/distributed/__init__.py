"""The heads of one training model across the ranks of ``torch.distributed``."""
