"""The main job on an embedded default: a small network, images that code draws, W8A8."""
