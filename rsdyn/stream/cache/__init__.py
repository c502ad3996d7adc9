"""Trajectories on disk: safetensors shards and one manifest, in a folder named by the hash of what made them."""

from rsdyn.stream.cache.ahead import ReadAhead
from rsdyn.stream.cache.manifest import FORMAT, MANIFEST, cache_key
from rsdyn.stream.cache.shard import DamagedShardError, Shard, trajectory_bytes
from rsdyn.stream.cache.store import DTYPES, TrajectoryCache, default_cache_dir

__all__ = [
    "DTYPES",
    "FORMAT",
    "MANIFEST",
    "DamagedShardError",
    "ReadAhead",
    "Shard",
    "TrajectoryCache",
    "cache_key",
    "default_cache_dir",
    "trajectory_bytes",
]
