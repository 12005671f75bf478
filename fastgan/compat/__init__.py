"""Other projects' op signatures, on fastgan's ops."""

from fastgan.compat import stylegan

__all__ = ["stylegan"]
