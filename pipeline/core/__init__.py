"""What every package needs: errors, the specs of what was chosen, files, locks, hashing, the machine, progress.

`spec` has the frozen dataclasses that decide a feature's value or a head's training, and their canonical JSON;
`files` has every file-system call, and writes aside, makes durable and renames.
"""
