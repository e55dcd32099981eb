"""What do the decoders make of bytes that nobody of ours would send? One file a decoder; `python -m fuzz` runs them.

Each file has `SEEDS`, which are valid, and `one`, which takes any bytes and raises only if a promise is broken. atheris
runs `one` for as long as it is given; the tests run it on seeds, mutations of them, and all that was ever found.
"""
