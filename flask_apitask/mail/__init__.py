from __future__ import annotations

from .rerouting import reroute as reroute

__all__ = ["reroute"]
