"""A decode step over fixed buffers, for a device: what its ops take, and their plain twins.

The ops of `twin` are the truth; `icecache.ops.triton` has the same names, arguments and results as
kernels. Neither synchronises with the host, and shapes depend on nothing that a step computes.
"""
