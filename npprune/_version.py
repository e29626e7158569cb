"""The version, for everyone: this module imports nothing."""

__version__ = "0.1.0"
