"""The package's version: part of the kernel cache's path, so it must be readable without installed metadata."""

__version__ = "0.1.0"
