"""The `relume` command: one file per command, one client of the node's API, one place that renders.

Built on argparse. The usual choice, typer, took 135 of 155 ms of each `relume start` here (its 0.29 converts arguments by
pydantic, which it imports), more than restoring takes; with argparse and only the invoked command's file it is 43 ms, of which Python itself takes 18.
"""
