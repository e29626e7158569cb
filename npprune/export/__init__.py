"""Ship a network: ONNX files that are checked before they get their name, and timed.

`onnx` writes the file, `graph` makes it readable, `precision` makes it smaller, `session` runs it,
`parity` compares it with PyTorch and guards the final name, `bench` times two networks side by
side, `predict` needs nothing but the file, `archive` writes the other formats.
"""
