"""Scopes, and the threads that they run on. Nothing in here knows Flask."""

from __future__ import annotations
