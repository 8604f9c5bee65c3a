"""Other ways to make one forward do what classifier-free guidance does in two.

Written from their papers, at their own sizes, for comparison on the same cache and base. Each is a
module whose ``denoiser(unet, schedule)`` gives the student on the base, or on a fine-tune of it.

Shape legend: B batch, C H W latent, N positions, L text tokens, D text width.
"""

from benchmarks.peers.agd import AttentionAdapters
from benchmarks.peers.dice import TextSharpener
from benchmarks.peers.meng import WholeUNet

Peer = WholeUNet | AttentionAdapters | TextSharpener
PEERS: dict[str, type[WholeUNet] | type[AttentionAdapters] | type[TextSharpener]] = {
    "meng": WholeUNet,
    "agd": AttentionAdapters,
    "dice": TextSharpener,
}
