"""scikit-learn: a fitted forest, and joblib's loky workers alive at the checkpoint."""

import json
import os
import secrets
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
from joblib import Parallel, delayed
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier

import relume


def predict(model, rows):
    return os.getpid(), model.predict(rows).tolist()


def main():
    token = secrets.token_hex(16)
    rows, labels = make_classification(2000, 20, random_state=0)
    model = RandomForestClassifier(50, random_state=0).fit(rows, labels)

    def answer():
        parts = Parallel(n_jobs=2, backend="loky")(
            delayed(predict)(model, part) for part in np.split(rows, 4)
        )
        return {
            "token": token,
            "workers": sorted({pid for pid, _ in parts}),
            "right": sum(sum(part) for _, part in parts) == int(labels.sum()),
            "draw": float(np.random.random()),
        }

    answer()
    print(relume.checkpoint())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(answer()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    HTTPServer(("0.0.0.0", 8000), Handler).serve_forever()


if __name__ == "__main__":
    main()
