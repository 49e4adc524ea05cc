"""The executor on a GPU: Triton kernels, decode steps as CUDA graphs, and a runner that never waits for the host."""
