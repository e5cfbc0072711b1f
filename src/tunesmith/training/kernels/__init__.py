"""What a GPU does in one kernel where PyTorch takes several; each says which plain lines it is."""
