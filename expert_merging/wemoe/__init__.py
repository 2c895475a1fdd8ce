"""WEMoE and E-WEMoE: feed-forward layers whose weights are merged anew for every input (arXiv 2402.00433, 2410.21804)."""
