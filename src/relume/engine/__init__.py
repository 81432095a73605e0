"""The criu engine: what freezes and revives a container, by runc and CRIU.

Its verbs (:mod:`relume.engine.criu`) run inside the keeper, one file for the story of each; the rest are the
pieces they and the node use: what stands in the way of a dump (preflight), the files that must come along
(held), what CRIU's log means (criulog), and the edits its images need (edit).
"""
