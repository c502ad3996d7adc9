"""Trajectories on disk: safetensors shards in a folder a model, found by what is in them, and an index a corpus."""

from rsdyn.stream.cache.ahead import ReadAhead
from rsdyn.stream.cache.corpus import TrajectoryCache, sequence_keys
from rsdyn.stream.cache.manifest import FORMAT, MANIFEST, cache_key
from rsdyn.stream.cache.shard import DamagedShardError, Shard, file_bytes
from rsdyn.stream.cache.store import DTYPES, ShardStore, default_cache_dir

__all__ = [
    "DTYPES",
    "FORMAT",
    "MANIFEST",
    "DamagedShardError",
    "ReadAhead",
    "Shard",
    "ShardStore",
    "TrajectoryCache",
    "cache_key",
    "default_cache_dir",
    "file_bytes",
    "sequence_keys",
]
