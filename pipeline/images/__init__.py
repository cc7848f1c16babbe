"""From the bytes of a file to uint8 RGB pixels (h, w, 3), decoded by separate processes.

`containers` and `jpeg` refuse files that are not there whole, `decoding` makes the pixels, `decode_process` runs it
where a crash does no harm, and `loader` reads, hashes and decodes many images at once.
"""
