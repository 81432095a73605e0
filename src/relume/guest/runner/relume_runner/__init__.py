"""The server of an app that is just functions in a ``main.py``.

``python3 -m relume_runner --port 8000`` imports ``main.py`` of the working directory, which is the app's
cold work, and then serves each of its public functions as ``POST /{function}``. The module may ask for a
checkpoint while it is imported, when nothing listens yet, or from a function later on; both work.

The story is in ``__main__``; each module below it holds one part. Needs Python >= 3.10, uvicorn and
Starlette.
"""
