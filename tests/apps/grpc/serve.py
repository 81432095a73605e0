"""A gRPC server whose handlers call a second one in the same container over a channel from before the checkpoint."""

import secrets
import threading
from concurrent import futures

import grpc

import relume

TOKEN = secrets.token_hex(16)
calls = 0


def server(address, name, handler):
    made = grpc.server(futures.ThreadPoolExecutor(4))
    handlers = {"Ask": grpc.unary_unary_rpc_method_handler(handler)}
    made.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
    made.add_insecure_port(address)
    made.start()
    return made


def inner(request, context):
    global calls
    calls += 1
    return f"{TOKEN} {calls} {request.decode()}".encode()


def outer(request, context):
    return inside(request, timeout=10)


servers = [server("127.0.0.1:9000", "Inner", inner)]
channel = grpc.insecure_channel("127.0.0.1:9000")
inside = channel.unary_unary("/Inner/Ask")
assert inside(b"warm", timeout=10).endswith(b" 1 warm")
servers.append(server("0.0.0.0:8000", "Outer", outer))
print(relume.checkpoint())
threading.Event().wait()
