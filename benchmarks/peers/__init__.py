"""Other ways to make one forward do what classifier-free guidance does in two.

Written from their papers, at their own sizes, for comparison on the same cache and base; how each
differs from its official code is in docs/peers.md. To add one, write a :class:`Peer` and name it in
``PEERS``.

Shape legend: B batch, C H W latent, N positions, L text tokens, D text width.
"""

from benchmarks.peers.agd import AttentionAdapters
from benchmarks.peers.dice import TextSharpener
from benchmarks.peers.meng import WholeUNet
from benchmarks.peers.ours import Ours
from benchmarks.peers.peer import Peer

PEERS: dict[str, type[Peer]] = {
    "meng": WholeUNet,
    "agd": AttentionAdapters,
    "dice": TextSharpener,
}

__all__ = ["PEERS", "Ours", "Peer"]
