"""Other ways to make one forward do what classifier-free guidance does in two.

Written from their papers, at their own sizes, for comparison on the same cache and base; how each
differs from its official code is in docs/peers.md. To add one, write a :class:`Peer` and name it in
``PEERS``.

Shape legend: B batch, C H W latent, N positions, L text tokens, D text width.
"""

from benchmarks.peers.agd import AttentionAdapters
from benchmarks.peers.dice import TextSharpener
from benchmarks.peers.lcm import ConsistencyLoRA, LargeConsistencyLoRA
from benchmarks.peers.lora import LargeLoRA, SmallLoRA
from benchmarks.peers.meng import WholeUNet
from benchmarks.peers.ours import Ours
from benchmarks.peers.papers_guides import PaperFull, PaperTiny
from benchmarks.peers.peer import Peer

# The quality table's.
PEERS: dict[str, type[Peer]] = {
    "meng": WholeUNet,
    "agd": AttentionAdapters,
    "dice": TextSharpener,
}
# All that train something, for the table at equal cost.
TRAINED: dict[str, type[Peer]] = {
    **PEERS,
    "paper-full": PaperFull,
    "paper-tiny": PaperTiny,
    "lora-1": SmallLoRA,
    "lora-8": LargeLoRA,
    "lcm-1": ConsistencyLoRA,
    "lcm-8": LargeConsistencyLoRA,
}

__all__ = ["PEERS", "TRAINED", "Ours", "Peer"]
