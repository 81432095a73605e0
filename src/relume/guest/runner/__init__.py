"""Not part of what a container sees: this file only gives the host's tools one name for the runner's
files."""
