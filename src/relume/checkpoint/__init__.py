"""Checkpoints: the two stories (:mod:`capture`, :mod:`restore`), when not to make one (:mod:`policy`), where
one fits (:mod:`platform`), and where they lie on this node (:mod:`shelf`)."""
