"""Tensors in, tensors out: the arithmetic of IceCache, one plain twin per op."""
