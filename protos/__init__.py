"""The wire. Generated stubs stand beside their .proto files; `make protos` regenerates them."""
