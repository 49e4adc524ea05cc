"""The messages of vllm.grpc.engine. They are not ours: the package smg-grpc-proto has them, and follows their owner.

Raises StartupError where it is not installed, or does not fit the protobuf that is.
"""

from __future__ import annotations

from google.protobuf.runtime_version import VersionError

from services.lifecycle import StartupError

__all__ = ["common_pb2", "vllm_pb2"]

_TYPE: str = "Type: pip install 'smg-grpc-proto>=0.4.28,<0.5'"

try:
    from smg_grpc_proto.generated import common_pb2
    from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb2
except ImportError as error:
    raise StartupError(f"--vllm-api needs the package smg-grpc-proto, which is not here ({error}). {_TYPE}") from error
except VersionError as error:
    raise StartupError(f"smg-grpc-proto does not fit the protobuf that is installed: {error}. {_TYPE}") from error
