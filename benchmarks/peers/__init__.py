"""Other ways to adapt the same tower to the same task, each small, after its paper,
tuned on the same validation part.

A :class:`Peer` fits one configuration to a few labelled images and hands back logits for any split.
`METHODS` is the list that :mod:`benchmarks.bench_peers` runs; one more method is one more line there.
"""

from benchmarks.peers.on_outputs import base, clip_adapter, linear_probe, tip_adapter, tip_adapter_f
from benchmarks.peers.on_tower import fine_tuning, lora, stream
from benchmarks.peers.on_units import coarse, fine, full, linear, output
from benchmarks.peers.tasks import Fitted, Peer, PeerTask, Split, digits, few, photographs

# Six configurations each where there is anything to choose, so that nobody is tuned more carefully than
# another.
METHODS = {
    "base": Peer(base, ({},), "zero-shot, no training"),
    "linear probe": Peer(
        linear_probe,
        tuple({"C": c} for c in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)),
        "Radford et al. 2021, scikit-learn",
    ),
    "CLIP-Adapter": Peer(
        clip_adapter,
        tuple({"lr": lr, "ratio": ratio} for lr in (1e-4, 1e-3, 1e-2) for ratio in (0.2, 0.6)),
        "Gao et al. 2021, arXiv 2110.04544",
    ),
    "Tip-Adapter": Peer(tip_adapter, ({},), "Zhang et al. 2022, arXiv 2207.09519"),
    "Tip-Adapter-F": Peer(
        tip_adapter_f,
        tuple({"lr": lr, "epochs": epochs} for lr in (1e-4, 1e-3, 1e-2) for epochs in (20, 100)),
        "Zhang et al. 2022, arXiv 2207.09519",
    ),
    "LoRA": Peer(
        lora,
        tuple({"lr": lr, "rank": rank} for lr in (3e-4, 1e-3, 3e-3) for rank in (4, 16)),
        "Hu et al. 2021, arXiv 2106.09685, through peft",
    ),
    "fine-tuning": Peer(
        fine_tuning,
        tuple({"lr": lr} for lr in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
        "all of the image tower",
    ),
    "ResiDual coarse": Peer(
        coarse, tuple({"rate": r} for r in (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)), "this library"
    ),
    "ResiDual fine": Peer(
        fine, tuple({"rate": r, "energy": e} for r in (1.0, 0.3, 0.1) for e in (0.90, 0.99)), "this library"
    ),
    "ResiDual full": Peer(full, tuple({"rate": r} for r in (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)), "this library"),
    "ResiDual output": Peer(
        output, tuple({"rate": r} for r in (1.0, 10.0, 100.0, 1e3, 3e3, 1e4)), "this library"
    ),
    "ResiDual linear": Peer(
        linear, tuple({"rate": r} for r in (0.3, 1.0, 3.0, 10.0, 100.0, 300.0)), "this library"
    ),
    "ResiDual stream": Peer(
        stream,
        tuple({"lr": lr, "energy": e} for lr in (0.3, 0.1, 0.03) for e in (0.90, 0.99)),
        "this library",
    ),
}

__all__ = ["METHODS", "Fitted", "Peer", "PeerTask", "Split", "digits", "few", "photographs"]
