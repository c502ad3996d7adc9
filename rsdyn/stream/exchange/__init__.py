"""Streams that somebody else recorded, and streams taken elsewhere."""

from rsdyn.stream.exchange.loading import load

__all__ = ["load"]
