"""vllm.grpc.engine.VllmEngine on the scheduler, for gateways that speak it: SMG drives Pagewire as it drives vLLM.

A front of another shape and nothing more: a request becomes one of ours (requests.py) and goes the way of ours, so
tenants, limits, errors and determinism are the same; its answer becomes their messages (responses.py). What SMG routes
by is told as it changes (kv_events.py, cache_view.py). Only this folder imports the package `smg-grpc-proto`
(stubs.py), and nothing imports this folder unless `--vllm-api` asks for it.
"""
