"""The pager: memory of a restored instance, on demand, from a process of its own.

``python -m relume.pager --control FD`` is what the keeper runs ahead of need; docs/pager.md tells the
protocol, the rules, and what is guaranteed. Other rooms speak to it through the control socket only
(:mod:`relume.pager.job` has the messages) and read working sets through :mod:`relume.pager.working_set`.
"""
