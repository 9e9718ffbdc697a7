"""How long a step may be: what probes say about the learning rate before training."""
