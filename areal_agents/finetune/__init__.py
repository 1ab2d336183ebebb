"""Fine-tuning without rollouts: imitation of chosen turns, and preferences between pairs (DPO)."""
