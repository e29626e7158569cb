"""Image files, by one rule for every command: which files count, and what their pixels are.

`folders` finds them, `decoding` reads them. No PyTorch is needed.
"""
