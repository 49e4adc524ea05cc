"""OpenAI's API over HTTP, for clients that speak nothing else.

A process that holds nothing: it is a gRPC client of the scheduler, by the same client that everybody has, so a stream
goes on through the death of a scheduler. What a request asks for is checked there; here it is only understood.
"""
