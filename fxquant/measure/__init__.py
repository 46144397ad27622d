"""What a model reaches and costs: accuracy, latency, errors layer by layer, studies."""
