from __future__ import annotations

from .flask_mail import reroute as reroute

__all__ = ["reroute"]
