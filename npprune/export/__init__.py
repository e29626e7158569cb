"""Ship a network: ONNX files that are checked before they get their name, and timed.

`checked` is the way in and brings the others together: `onnx` writes the file, `graph` makes it
readable, `precision` makes it smaller, `session` runs it, `parity` compares it with PyTorch,
`npprune.files` guards the final name. `runtimes` opens a network in any runtime, `bench` times two
networks side by side, `widths` prices hidden units in milliseconds, `predict` needs nothing but the
file, `archive` writes the other formats.
"""
