"""HEMoE: a dense LLaMA into experts of different sizes. Domains, neuron importance, partition; then the MoE."""
