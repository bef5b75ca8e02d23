"""Baseline policies: the rules of verl and of its peers, one file each with its source. Each is a `verl_heddle.simulate.Policy`.

First come first served or priority order inside the replica is not a policy but `EngineOptions.order`.
"""

from verl_heddle.simulate.baselines.affinity_margin import AffinityMargin
from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.simulate.baselines.continuum import Continuum
from verl_heddle.simulate.baselines.dual_threshold import DualThreshold
from verl_heddle.simulate.baselines.lfs import Lfs
from verl_heddle.simulate.baselines.lpt_oracle import LptOracle
from verl_heddle.simulate.baselines.plas import Plas
from verl_heddle.simulate.baselines.round_robin import RoundRobin
from verl_heddle.simulate.baselines.slime import Slime
from verl_heddle.simulate.baselines.stock import Stock
from verl_heddle.simulate.baselines.thunder_agent import ThunderAgent
from verl_heddle.simulate.baselines.trajectory_fcfs import TrajectoryFcfs
from verl_heddle.simulate.baselines.uniboost import UniBoost
from verl_heddle.simulate.baselines.verl_star import VerlStar
from verl_heddle.simulate.baselines.wave_admission import WaveAdmission

__all__ = [
    "AffinityMargin",
    "Continuum",
    "DualThreshold",
    "Lfs",
    "LptOracle",
    "Peer",
    "PeerReason",
    "Plas",
    "RoundRobin",
    "Slime",
    "Stock",
    "ThunderAgent",
    "TrajectoryFcfs",
    "UniBoost",
    "VerlStar",
    "WaveAdmission",
]
