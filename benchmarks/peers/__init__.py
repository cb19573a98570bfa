"""The methods that hybridopt is compared with, small ones written from their papers."""

from benchmarks.peers.averaging import EMAEvaluation
from benchmarks.peers.ema_nesterov import EMANesterov
from benchmarks.peers.extrapolation import FilteredExtrapolation
from benchmarks.peers.hypergradient import Hypergradient
from benchmarks.peers.lbfgs import IteratedLBFGS
from benchmarks.peers.lookahead import Lookahead
from benchmarks.peers.muon import MuonAdamW
from benchmarks.peers.snoo import SNOO

__all__ = [
    "SNOO",
    "EMAEvaluation",
    "EMANesterov",
    "FilteredExtrapolation",
    "Hypergradient",
    "IteratedLBFGS",
    "Lookahead",
    "MuonAdamW",
]
