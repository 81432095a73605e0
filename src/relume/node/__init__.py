"""The agent of one machine: its API, its instances and their lifecycle, what it remembers."""
