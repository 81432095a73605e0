"""Functions that ask for nothing: the checkpoint is taken once the runner is ready."""

import random
import secrets
import ssl
import threading

token = secrets.token_hex(16)
ssl.RAND_bytes(16)  # OpenSSL's generator has its seed from here on
ticks = 0


def _tick():
    global ticks
    while not _stop.wait(0.02):
        ticks += 1


_stop = threading.Event()
threading.Thread(target=_tick, daemon=True).start()


def draw():
    return {"random": random.random(), "openssl": ssl.RAND_bytes(16).hex()}


def remember():
    return {"token": token, "ticks": ticks}
