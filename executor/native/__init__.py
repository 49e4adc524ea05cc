"""The executor's own C++ kernels: packed linears, paged attention, and the whole Llama-family forward in one call.

Plain C names and structs, no torch inside: compiled in seconds by `python -m executor.native.build` (part of
`make setup`), for every instruction set at once; the fastest that the machine has is chosen when the library is loaded.
"""
