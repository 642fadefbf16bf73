"""Put the gRPC service on a port, in one of two ways.

Behind HAProxy, Serve gives each replica a gRPC port and spreads calls over them. It is told of a
service by a function that adds it to a server; `attach` is that function, and adds handlers that
run here, in the replica. Without HAProxy, each replica of a machine listens on the same port by
itself and the kernel spreads connections. docs/decisions/0004-grpc.md has the measurements.
"""

import os
from typing import Any

import grpc

from rayloop.config import ServeConfig
from rayloop.errors import RequestError
from rayloop.serve.grpc_app import SERVICE, GrpcApp, refuse
from rayloop.serve.protocol import inference_pb2 as pb
from rayloop.serve.protocol.error import ProtocolError

ATTACH = "rayloop.serve.grpc_server.attach"
"""For `grpc_servicer_functions` of Serve's gRPC options."""

LONGEST_CONNECTION_MS, LONGEST_FAREWELL_MS = 30_000, 10_000
"""Without HAProxy a connection stays with one replica, so that it is renewed now and then."""

SPARE_BYTES = 65_536
"""Of a message beyond `max_body_bytes`: names, shapes and parameters."""

_here: list[GrpcApp] = []


def serve_here(app: GrpcApp) -> None:
    """Make an app the one that `attach` adds in this process."""
    _here[:] = [app]


def attach(servicer: Any, server: Any) -> None:
    """Add the service to a server of Serve's, past its own handling of requests.

    Serve calls this in each replica, and in the proxy that stands in while there is no replica;
    there, every call is answered with UNAVAILABLE.

    Args:
        servicer: A placeholder of Serve's.
        server: Its `grpc.aio` server.
    """
    handlers = _here[0].handlers() if _here else _absent()
    server.add_passthrough_service(SERVICE)
    server.add_generic_rpc_handlers((handlers,))


def is_private(host: str) -> bool:
    """Whether an address is reached from its own machine only."""
    return host.startswith("127.") or host in ("localhost", "::1")


def hosted_by_serve() -> bool:
    """Whether Serve gives replicas a gRPC port in this environment."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def own_server(app: GrpcApp, config: ServeConfig) -> Any:
    """A server on the shared port, bound and not yet started.

    Raises:
        RequestError: The port cannot be bound.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", config.max_body_bytes + SPARE_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_connection_age_ms", LONGEST_CONNECTION_MS),
            ("grpc.max_connection_age_grace_ms", LONGEST_FAREWELL_MS),
        ]
    )
    server.add_generic_rpc_handlers((app.handlers(),))
    host = f"[{config.host}]" if ":" in config.host else config.host or "0.0.0.0"
    try:
        server.add_insecure_port(f"{host}:{config.grpc_port}")
    except RuntimeError as error:
        raise RequestError(
            f"serve.grpc_port={config.grpc_port} on {config.host} cannot be bound ({error}); "
            "choose another with --serve.grpc_port (0 picks a free one)."
        ) from error
    return server


def _absent() -> Any:
    methods = {
        name: grpc.unary_unary_rpc_method_handler(_no_replica)
        for name in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
        if name != "ModelStreamInfer"
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


async def _no_replica(_: bytes, context: Any) -> bytes:
    return refuse(context, ProtocolError(503, "No replica is ready; try again shortly.", 1))
