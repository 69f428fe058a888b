"""ARLON (arXiv 2410.20502): text in, long video out. The method, without Ray."""

__version__ = "0.1.0"
