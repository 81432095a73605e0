"""The process beside each instance, and the node's client for it.

Why it exists: an instance must not notice that the node dies. So everything that an instance hangs on lives
in a process of its own, small and simple, which is forked ahead of need (:mod:`relume.keeper.zygote`) and which
the node reconnects to:

- the pipes of stdout and stderr, the log, the exit status (the keeper is a child subreaper);
- the sidecar's listener inside the instance's network namespace, with its requests in flight;
- the published port;
- the runc commands that boot, dump and restore the instance, and the probe for readiness;
- the holder of the pager's descriptors.

conmon, which does the first of these for podman, is not used: the other four need a process of ours in any
case, and one process fewer per instance is worth the hundred lines.

What it guarantees: it never decides (the node does), it ends only when its instance has ended and the exit
status is on disk, and a lost node changes nothing for the instance. What it does not: survive its own
SIGKILL. Then the instance's stdio is gone; the node sees it and ends the instance.
"""
