"""The processes: the command line, the gRPC services, and the loop that drives the core."""
