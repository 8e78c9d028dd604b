"""What is read at the draws, against known answers."""
