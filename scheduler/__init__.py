"""Everything that is decided: queues, block tables, prefix hashes, batching. No clock, socket, thread or tensor."""
