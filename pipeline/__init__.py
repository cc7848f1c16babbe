"""Icebox: a feature cache for image transfer learning.

The modules stand on floors: each imports only from those below it (docs/architecture.md has the list).
"""
