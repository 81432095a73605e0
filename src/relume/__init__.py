"""relume: containers that start from a memory checkpoint.

An app does its slow start-up once, asks for a checkpoint from inside its container, and every later
container of the same build begins from that memory. docs/architecture.md is the map of this package.
"""

__version__ = "0.1.0"
