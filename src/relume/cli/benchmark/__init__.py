"""The parts of `relume bench`: its workloads, its own node, what is measured, and what becomes of it."""
