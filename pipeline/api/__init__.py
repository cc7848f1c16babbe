"""Icebox from Python: `Icebox`, a data directory with a method for each command, and what the methods take and return.

`options` declares every option once, for methods and commands alike; `requests` makes the typed objects of them that
the library takes; `results` has what comes back.
"""
