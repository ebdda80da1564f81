"""Scopes and the threads they run on. Nothing in this package knows about Flask."""

from __future__ import annotations
