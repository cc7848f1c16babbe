"""Modules that every other package uses: errors, specs, files, locks, hashing, the machine, progress.

`spec` has the frozen dataclasses of the settings that decide a feature's value or a head's training, and their
canonical JSON. `files` has all file-system calls, with atomic writes.
"""
