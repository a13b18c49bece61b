"""The embed job beside the same work in one tight process, the obvious Ray Data job, and a PyTorch DataLoader script."""
