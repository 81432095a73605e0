"""ONNX Runtime: a session with its thread pools."""

import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import relume

token = secrets.token_hex(16)
draw = np.random.default_rng(0)
layers = [draw.standard_normal((256, 256), dtype=np.float32) / 16 for _ in range(16)]
nodes = []
for n in range(16):
    nodes.append(helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"y{n}"]))
    nodes.append(helper.make_node("Tanh", [f"y{n}"], [f"x{n + 1}"]))
graph = helper.make_graph(
    nodes,
    "chain",
    [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["n", 256])],
    [helper.make_tensor_value_info("x16", TensorProto.FLOAT, ["n", 256])],
    [numpy_helper.from_array(layer, f"w{n}") for n, layer in enumerate(layers)],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
x = np.ones((64, 256), np.float32)
expected = session.run(None, {"x0": x})[0]
print(relume.checkpoint())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        same = bool(np.array_equal(session.run(None, {"x0": x})[0], expected))
        body = json.dumps({"token": token, "same": same}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
