from __future__ import annotations

from .libraries import find_reroute as find_reroute

__all__ = ["find_reroute"]
