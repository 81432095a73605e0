"""The node's side of the region: publish what it makes, find what others made, bring that here.

Only a node with ``[store] url`` has one (and imports :mod:`relume.store`). One noun a module:

- ``view``: the store through this node's eyes: what is there, what fits, what is refused;
- ``uploads``: the right to make a checkpoint, and its way into the store;
- ``learned``: working sets, to the store and from it;
- ``copies``: checkpoints of the region on this disk, whole or partial;
- ``builds``: builds that another node made, and this node's for the others;
- ``catalogue``: the verbs of ``relume checkpoints`` that look into the store;
- ``folder``: what the region keeps beside a checkpoint's own files.

Guarantees: a store that does not answer delays by its patience and fails nothing; what is wrong is refused with
its reason, and not looked at again until the node restarts. A node never publishes over a manifest that it cannot
verify.
"""

from relume.node.region.copies import Copy
from relume.node.region.region import NodeRegion

__all__ = ["Copy", "NodeRegion"]
