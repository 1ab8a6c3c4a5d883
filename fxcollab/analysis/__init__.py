"""Partition: which level every node, module and tensor belongs to."""
