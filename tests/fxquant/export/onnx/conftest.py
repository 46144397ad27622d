"""Without the extra ``[onnx]`` there is nothing to test."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("onnxruntime") is None:
    collect_ignore_glob = ["test_*.py"]
