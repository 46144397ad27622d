"""A compiled model as files for other programs: a folder of C++ that stands alone."""

from fxquant.export.cpp import export_cpp

__all__ = ["export_cpp"]
