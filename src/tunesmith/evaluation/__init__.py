"""What a tuned model learnt and kept."""
