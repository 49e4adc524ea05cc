"""KServe's Open Inference Protocol on the scheduler, for Triton's clients: text in, text out.

It is another way to say what protos/inference.proto says: each request becomes one of ours, and is admitted, checked,
queued and answered as those are, for the same tenants and within the same limits. Nothing is decided here.
"""
