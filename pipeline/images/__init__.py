"""Decode the bytes of image files to uint8 RGB pixels (h, w, 3), in separate processes.

`containers` and `jpeg` refuse incomplete files, `decoding` decodes and resizes, `decode_process` does so in a process
that may crash, and `loader` reads, hashes and decodes many images at once.
"""
