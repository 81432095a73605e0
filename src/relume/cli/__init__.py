"""The `relume` command: one file per command, one client of the node's API, one place that renders.

Built on argparse. The usual choice, typer, took 135 of the 155 ms that `relume ps` took here (typer 0.29 imports
pydantic to convert arguments). With argparse, and only the invoked command's file imported, it is 43 ms, of which
Python's own start is 18.
"""
