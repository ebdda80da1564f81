"""Measure what a task costs a request, next to the peers. See ``README.md``."""
