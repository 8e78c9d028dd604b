"""What comes back: estimates with their errors, and how they are kept on disk."""
