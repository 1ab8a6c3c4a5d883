"""Partition: which level everything belongs to."""

from fxcollab.partition.partition import Partition, partition

__all__ = ["Partition", "partition"]
