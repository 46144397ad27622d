"""The simulated graph: observers, quantizers, calibration, bias correction."""
