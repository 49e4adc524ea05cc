"""Triton kernels, one file for each idea. To import one imports triton, which is not everywhere."""
